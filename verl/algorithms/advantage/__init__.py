"""Advantage estimators."""

from verl.algorithms.advantage.dr_grpo import dr_grpo
from verl.algorithms.advantage.gae import gae
from verl.algorithms.advantage.grpo import grpo
from verl.algorithms.advantage.registry import ADVANTAGES, AdvantageEstimator
from verl.algorithms.advantage.reinforce_plus_plus import reinforce_plus_plus
from verl.algorithms.advantage.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from verl.algorithms.advantage.rloo import rloo

__all__ = [
    "ADVANTAGES",
    "AdvantageEstimator",
    "dr_grpo",
    "gae",
    "grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
]
