"""Threads and devices: planned for what the machine has."""

from __future__ import annotations

import pytest
import torch

from verl.config.trainer import Device, TrainerConfig
from verl.single_controller import resources
from verl.single_controller.resources import actor_options, plan_layout


@pytest.mark.parametrize(("cores", "ranks"), [(2, 2), (2, 1), (8, 2), (8, 3), (64, 8)])
def test_processes_that_work_at_the_same_time_have_no_more_threads_than_there_are_cores(monkeypatch, cores, ranks):
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    layout = plan_layout(TrainerConfig(n_gpus_per_node=ranks, device=Device.cpu))
    assert layout.rank_threads * ranks <= cores  # ranks work side by side
    assert layout.rollout_threads <= cores  # the engine works while they wait
    assert plan_layout(TrainerConfig(n_gpus_per_node=ranks, device=Device.cpu), 1).rollout_threads == 1
    options = actor_options(layout, None, 0, 0.5, layout.rank_threads)
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(layout.rank_threads)


def test_more_ranks_than_cores_are_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    with caplog.at_level("WARNING", logger="verl"):
        assert plan_layout(TrainerConfig(n_gpus_per_node=4, device=Device.cpu)).rank_threads == 1
    assert "trainer.n_gpus_per_node=4 processes on 2 core(s)" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="trainer.device=cuda, and torch sees no GPU"):
        plan_layout(TrainerConfig(device=Device.cuda))
    assert plan_layout(TrainerConfig(n_gpus_per_node=1)).device == "cpu"
