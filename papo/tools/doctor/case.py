"""Findings of the doctor, and the case that its checks look at: a machine and the config of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a broken installation must not keep the doctor from starting
    from papo.tools.doctor.memory import Estimate
    from verl.algorithms.requirements import Requirements
    from verl.config.config import Config
    from verl.data.vision import VisionProcessor


GIB = 2**30


class Level(StrEnum):
    """`error`: the run will not work. `warning`: it will, worse than it could, or this could not be made sure."""

    ok = "ok"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Finding:
    """`topic` is a word or two, `text` one line, `fix` what to do, empty where nothing is to do."""

    level: Level
    topic: str
    text: str
    fix: str = ""


def ok(topic: str, text: str) -> Finding:
    return Finding(Level.ok, topic, text)


def warning(topic: str, text: str, fix: str) -> Finding:
    return Finding(Level.warning, topic, text, fix)


def error(topic: str, text: str, fix: str = "") -> Finding:
    return Finding(Level.error, topic, text, fix)


def in_short(reason: BaseException) -> str:
    """An exception in one line."""
    lines = str(reason).strip().splitlines() or ["no message"]
    return f"{type(reason).__name__}: {lines[0][:200]}"


def in_gib(size: float) -> str:
    """Bytes as one reads them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class GPU:
    """`memory` and `free` in bytes; `capability` (major, minor), None for a GPU that is only asked about."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int] | None = None


@dataclass
class Case:
    """`imagined`: `gpus` are those of a machine that one is not on. `images_per_row`, `longest_prompt` (tokens, of the
    rows that were read) and `estimate` are what the checks of data and memory find out. What takes time to load is
    loaded once; where it does not load, asking for it raises the reason."""

    gpus: list[GPU]
    imagined: bool = False
    config: Config | None = None
    images_per_row: int = 1
    longest_prompt: int | None = None
    estimate: Estimate | None = None

    @property
    def device(self) -> str:
        """cuda or cpu, as the run would choose here."""
        wanted = self.config.trainer.device.value
        return ("cuda" if self.gpus else "cpu") if wanted == "auto" else wanted

    @cached_property
    def hf_config(self) -> Any:
        return load_hf_config(self.config.worker.actor.model.model_path, self.config)

    @cached_property
    def vision(self) -> VisionProcessor:
        from verl.data.vision import VisionProcessor

        data, model = self.config.data, self.config.worker.actor.model
        return VisionProcessor(model.model_path, data.min_pixels, data.max_pixels, model.trust_remote_code)

    @cached_property
    def requirements(self) -> Requirements:
        from verl.algorithms.requirements import requirements_of
        from verl.config.sizes import compute_sizes

        try:
            updates = compute_sizes(self.config).updates_per_step
        except ValueError:
            updates = 1  # a check of its own says what does not fit
        return requirements_of(self.config.algorithm, updates)


def load_hf_config(model_path: str, config: Config) -> Any:
    """config.json of a folder or hub name, of a supported family. Raises ValueError or FileNotFoundError naming it."""
    from verl.models.families import family_of
    from verl.models.loading import load_config

    loaded = load_config(model_path, config.worker.actor.model.trust_remote_code)
    family_of(loaded)
    return loaded
