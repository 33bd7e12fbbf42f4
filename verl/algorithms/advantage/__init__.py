"""Advantage estimators."""

from verl.algorithms.advantage.grpo import grpo
from verl.algorithms.advantage.registry import ADVANTAGES, AdvantageEstimator

__all__ = ["ADVANTAGES", "AdvantageEstimator", "grpo"]
