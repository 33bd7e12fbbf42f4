"""The engines that come with verl: importing this module registers them, and imports none of their libraries."""

from __future__ import annotations

import importlib.util
import logging

from verl.config.worker import RolloutConfig
from verl.workers.rollout.base import ENGINES
from verl.workers.rollout.hf_engine import HFEngine
from verl.workers.rollout.vllm_engine import VLLMEngine

__all__ = ["ENGINES", "HFEngine", "VLLMEngine", "choose_engine", "is_installed"]

logger = logging.getLogger(__name__)


def is_installed(name: str) -> bool:
    """Whether the package that an engine needs is there."""
    package = ENGINES[name].package
    return package is None or importlib.util.find_spec(package) is not None


def choose_engine(rollout: RolloutConfig) -> str:
    """The engine that `worker.rollout.name` asks for: `auto` is one with a package of its own where that is installed.

    Raises ValueError for an engine that is unknown, not installed, or not fit for several GPUs where those are asked.
    """
    name = rollout.name
    if name == "auto":
        preferred = sorted(ENGINES, key=lambda each: ENGINES[each].package is None)
        name = next(each for each in preferred if is_installed(each))
        first = ENGINES[preferred[0]].package
        hint = f" ({first} is not installed; it is much faster: see examples/README.md, Rollout engines)"
        logger.info("rollout engine: %s%s", name, "" if name == preferred[0] else hint)
    engine = ENGINES[name]
    if not is_installed(name):
        raise ValueError(
            f"worker.rollout.name={name}, and {engine.package} is not installed: run {engine.install}, or use another "
            "engine, such as worker.rollout.name=hf"
        )
    if rollout.tensor_parallel_size > 1 and not engine.spans_gpus:
        raise ValueError(f"worker.rollout.tensor_parallel_size: the engine {name} runs on one GPU; use another engine")
    return name
