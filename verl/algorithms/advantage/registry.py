"""The table of advantage estimators."""

from __future__ import annotations

from collections.abc import Callable

import torch

from verl.registry import Registry

# (scores [B], group [B] int64, response_mask [B, T]) -> advantages [B, T]
AdvantageEstimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ADVANTAGES: Registry[AdvantageEstimator] = Registry("advantage estimator")
