"""Threads and devices: planned for what the machine has."""

from __future__ import annotations

import os

import pytest
import torch

from verl.config.trainer import Device, TrainerConfig
from verl.config.worker import RolloutConfig
from verl.single_controller import resources
from verl.single_controller.resources import Layout, actor_options, plan_layout, wide_seats
from verl.single_controller.rollout_group import choose_carrier
from verl.utils import process


@pytest.mark.parametrize(("cores", "ranks"), [(2, 2), (2, 1), (8, 2), (8, 3), (64, 8)])
def test_processes_that_work_at_the_same_time_have_no_more_threads_than_there_are_cores(monkeypatch, cores, ranks):
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    trainer = TrainerConfig(n_gpus_per_node=ranks, device=Device.cpu)
    layout = plan_layout(trainer, RolloutConfig())
    assert layout.rank_threads * ranks <= cores  # ranks work side by side
    assert layout.rollout_threads <= cores  # the engine works while they wait
    assert plan_layout(trainer, RolloutConfig(cpu_threads=1)).rollout_threads == 1
    two = plan_layout(trainer, RolloutConfig(data_parallel_size=2))
    assert two.replicas == 2 and two.rollout_threads * 2 <= cores
    options = actor_options(layout, None, 0, 0.5, layout.rank_threads)
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(layout.rank_threads)


def test_more_ranks_than_cores_are_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    with caplog.at_level("WARNING", logger="verl"):
        assert plan_layout(TrainerConfig(n_gpus_per_node=4, device=Device.cpu), RolloutConfig()).rank_threads == 1
    assert "trainer.n_gpus_per_node=4 processes on 2 core(s)" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="trainer.device=cuda, and torch sees no GPU"):
        plan_layout(TrainerConfig(device=Device.cuda), RolloutConfig())
    with pytest.raises(ValueError, match="worker.rollout.dedicated_gpus=1, and this run is on CPU"):
        plan_layout(TrainerConfig(n_gpus_per_node=1), RolloutConfig(dedicated_gpus=1))
    assert plan_layout(TrainerConfig(n_gpus_per_node=1), RolloutConfig()).device == "cpu"


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.parametrize(
    ("ranks", "rollout", "replicas"),
    [
        (8, {}, 8),
        (8, {"tensor_parallel_size": 2}, 4),
        (8, {"tensor_parallel_size": 2, "data_parallel_size": 1}, 1),
        (6, {"dedicated_gpus": 2}, 2),
        (4, {"dedicated_gpus": 4, "tensor_parallel_size": 4}, 1),
    ],
)
def test_engines_fill_the_gpus_that_they_share_or_have_to_themselves(eight_gpus, ranks, rollout, replicas):
    layout = plan_layout(TrainerConfig(n_gpus_per_node=ranks), RolloutConfig(**rollout))
    assert (layout.device, layout.ranks, layout.replicas) == ("cuda", ranks, replicas)


@pytest.mark.parametrize(
    ("ranks", "rollout", "message"),
    [
        (8, {"dedicated_gpus": 2}, "n_gpus_per_node=8 and worker.rollout.dedicated_gpus=2: this machine has 8"),
        (8, {"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the 8 GPUs"),
        (4, {"tensor_parallel_size": 2, "data_parallel_size": 4}, "data_parallel_size=4 x tensor_parallel_size=2"),
    ],
)
def test_engines_that_do_not_fit_are_refused(eight_gpus, ranks, rollout, message):
    with pytest.raises(ValueError, match=message):
        plan_layout(TrainerConfig(n_gpus_per_node=ranks), RolloutConfig(**rollout))


def test_an_engine_over_several_gpus_has_them_all_on_one_node():
    """Ray does not promise in which order it deals bundles out to nodes."""
    places = {0: ("a", "0"), 1: ("b", "3"), 2: ("a", "1"), 3: ("b", "0"), 4: ("a", "2"), 5: ("b", "1")}
    seats = wide_seats(places, width=2, replicas=2, share=0.4)
    assert [(seat.bundle, seat.visible_gpus) for seat in seats] == [(0, ["0", "1"]), (1, ["3", "0"])]
    with pytest.raises(ValueError, match="3 engines do not fit on nodes with \\[3, 3\\] GPUs"):
        wide_seats(places, width=2, replicas=3, share=0.4)


def test_the_carrier_follows_from_where_engines_and_trainer_are():
    def layout(device: str, dedicated: int = 0) -> Layout:
        return Layout(device, 2, 1, 1, dedicated_gpus=dedicated)

    assert choose_carrier("auto", layout("cpu")) == "object_store"
    assert choose_carrier("auto", layout("cuda")) == "ipc"
    assert choose_carrier("auto", layout("cuda", 2)) == "collective"
    for name, place in (("ipc", layout("cuda", 2)), ("collective", layout("cuda")), ("pigeon", layout("cpu"))):
        with pytest.raises(ValueError, match="worker.rollout.weight_sync"):
            choose_carrier(name, place)


def test_all_kinds_of_workers_fit_on_one_gpu():
    shares = (resources.ACTOR_SHARE, resources.REFERENCE_SHARE, resources.CRITIC_SHARE, resources.ROLLOUT_SHARE)
    assert sum(round(share * 10_000) for share in shares) <= 10_000  # as Ray counts them


def test_workers_get_settings_of_the_driver_and_no_secret(monkeypatch):
    """Ray keeps a job's environment and shows it to whoever may look at the dashboard."""
    asked = {}
    monkeypatch.setattr(resources.ray, "init", lambda **options: asked.update(options))
    for name in ("HF_HOME", "HF_TOKEN", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "x")
    resources.start_ray(plan_layout(TrainerConfig(n_gpus_per_node=1, device=Device.cpu), RolloutConfig()))
    passed_on = asked["runtime_env"]["env_vars"]
    assert passed_on["HF_HOME"] == passed_on["NCCL_DEBUG"] == "x" and "HF_TOKEN" not in passed_on


def find_device(device: Device = Device.auto, nnodes: int = 1) -> str:
    return resources.find_device(TrainerConfig(device=device, nnodes=nnodes))


def test_gpus_that_the_driver_sees_and_torch_cannot_use_stop_a_run(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resources, "driver_gpus", lambda: ["NVIDIA H100, 570.86"])
    with pytest.raises(ValueError, match="the driver sees NVIDIA H100, 570.86, .* driver 580 or newer"):
        find_device()
    assert find_device(Device.cpu) == "cpu"
    monkeypatch.setattr(resources, "driver_gpus", list)
    assert find_device() == "cpu"


def test_a_head_node_without_gpus_asks_the_cluster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resources, "driver_gpus", list)
    asked = []
    monkeypatch.setattr(resources, "cluster_gpus", lambda nnodes, timeout: asked.append(nnodes) or 16)
    assert find_device(nnodes=2) == "cuda" and asked == [2]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_device() == "cuda" and find_device(Device.cuda) == "cuda" and asked == [2, 1]
    monkeypatch.setattr(resources, "cluster_gpus", lambda nnodes, timeout: 0)
    assert find_device() == "cpu"


def test_the_gpus_of_a_cluster_are_counted_when_its_nodes_are_there(monkeypatch):
    joined = []
    monkeypatch.setattr(resources, "join_cluster", joined.append)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"GPU": 16.0})
    monkeypatch.setattr(resources.ray, "shutdown", lambda: joined.append("left"))
    assert resources.cluster_gpus(2, 1.0) == 16 and joined == [2, "left"]


@pytest.mark.parametrize(
    ("name", "value", "shared", "refused"),
    [
        ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1", False, True),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: True", True, True),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", False, False),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:512", True, False),
    ],
)
def test_settings_of_the_environment_that_break_workers_on_gpus(monkeypatch, name, value, shared, refused):
    monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ValueError, match=name):
            resources.check_environment(shares_gpus=shared)
    else:
        resources.check_environment(shares_gpus=shared)


def test_gloo_takes_the_interface_of_the_nodes_address(monkeypatch):
    assert process.interface_of("127.0.0.1") == "lo" and process.interface_of("192.0.2.77") is None
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    process.prepare_gloo("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    process.prepare_gloo("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
