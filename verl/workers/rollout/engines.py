"""The engines that come with verl: importing this module registers them."""

from verl.workers.rollout.base import ENGINES
from verl.workers.rollout.hf_engine import HFEngine

__all__ = ["ENGINES", "HFEngine"]
