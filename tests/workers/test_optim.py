"""The learning-rate schedule, by its corners."""

from __future__ import annotations

import pytest

from verl.config.worker import LRSchedule, OptimConfig
from verl.workers.training.optim import lr_factor


def test_warm_up_then_constant():
    factor = lr_factor(OptimConfig(lr_warmup_steps=4), total_updates=100)
    assert [factor(u) for u in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factor(10_000) == 1.0


def test_cosine_falls_from_one_to_the_ratio_and_stays():
    options = OptimConfig(lr_warmup_steps=10, lr_scheduler_type=LRSchedule.cosine, min_lr_ratio=0.1)
    factor = lr_factor(options, total_updates=110)
    assert factor(10) == 1.0 and factor(60) == pytest.approx(0.55) and factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)
    values = [factor(u) for u in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_no_warm_up_starts_at_full_rate():
    assert lr_factor(OptimConfig(), total_updates=5)(0) == 1.0
