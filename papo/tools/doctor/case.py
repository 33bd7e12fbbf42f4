"""What checks look at: a machine and, where one is given, the config of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a broken installation must not keep the doctor from starting
    from papo.tools.doctor.estimate import Estimate
    from verl.algorithms.requirements import Requirements
    from verl.config.config import Config
    from verl.data.vision import VisionProcessor


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

        return requirements_of(self.config.algorithm, compute_sizes(self.config).updates_per_step)


def load_hf_config(model_path: str, config: Config) -> Any:
    """config.json of a folder or hub name. Raises ValueError or FileNotFoundError naming it."""
    from transformers import AutoConfig

    from verl.models.families import family_of
    from verl.utils.files import check_model_path

    check_model_path(model_path)
    try:
        loaded = AutoConfig.from_pretrained(model_path, trust_remote_code=config.worker.actor.model.trust_remote_code)
    except (OSError, ValueError) as reason:
        raise ValueError(f"the model '{model_path}' has no config.json that can be read: {reason}") from reason
    family_of(loaded)
    return loaded
