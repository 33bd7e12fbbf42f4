"""What the policy losses share: a clip range, and the log-ratio to the policy that the responses came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.config.algorithm import LossTermConfig

# exp(20) is the largest ratio that a float32 sum of a batch survives; a policy that far away is clipped anyway.
MAX_LOG_RATIO = 20.0


@dataclass
class ClipTermConfig(LossTermConfig):
    """Clip range [1 - clip_ratio_low, 1 + clip_ratio_high] of a ratio pi / pi_old."""

    coef: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.3

    def check(self, key: str) -> None:
        super().check(key)
        if not 0 <= self.clip_ratio_low <= 1:
            raise ValueError(f"{key}.clip_ratio_low={self.clip_ratio_low}: a value from 0 to 1 is needed")
        if self.clip_ratio_high < 0:
            raise ValueError(f"{key}.clip_ratio_high={self.clip_ratio_high}: a value of 0 or more is needed")


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """`log_ratio`, at most 20 either way; beyond that its gradient is 0."""
    return torch.clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
