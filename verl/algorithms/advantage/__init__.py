"""Advantage estimators."""

from verl.algorithms.advantage.dr_grpo import dr_grpo
from verl.algorithms.advantage.gae import gae
from verl.algorithms.advantage.grpo import grpo
from verl.algorithms.advantage.registry import ADVANTAGES, AdvantageEstimator, advantage
from verl.algorithms.advantage.reinforce_plus_plus import reinforce_plus_plus
from verl.algorithms.advantage.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from verl.algorithms.advantage.remax import remax
from verl.algorithms.advantage.rloo import rloo
from verl.algorithms.advantage.shaper import SHAPERS, AdvantageShaper, ShaperKind, advantage_shaper, build_shapers

__all__ = [
    "ADVANTAGES",
    "SHAPERS",
    "AdvantageEstimator",
    "AdvantageShaper",
    "ShaperKind",
    "advantage",
    "advantage_shaper",
    "build_shapers",
    "dr_grpo",
    "gae",
    "grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]
