"""From a preset's name and `key=value` overrides to the typed config."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.config import Config
from verl.config.store import store_schema
from verl.plugins import load_plugins

CONFIG_DIR = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "configs"))


def presets(config_dir: str = CONFIG_DIR) -> list[str]:
    """Names of the presets in `config_dir`; none where there is no such folder."""
    if not os.path.isdir(config_dir):
        return []
    return sorted(file.removesuffix(".yaml") for file in os.listdir(config_dir) if file.endswith(".yaml"))


def compose_config(name: str, overrides: Sequence[str] = (), config_dir: str = CONFIG_DIR) -> Config:
    """The preset `name` with Hydra `overrides`, typed and resolved.

    Raises:
        ValueError: there is no such preset, an override names no key or has the wrong type, or a key that has
            no default was not given.
        FileNotFoundError: a plugin that the environment names does not exist.
    """
    load_plugins()
    store_schema()
    if name not in presets(config_dir):
        known = (
            ", ".join(presets(config_dir)) or "none; verl is installed in place (scripts/install.sh), or --config-dir"
        )
        raise ValueError(f"there is no preset '{name}' in {config_dir}; there are: {known}")
    try:
        with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
            raw = compose(name, overrides=list(overrides))
        if raw.trainer.experiment_name is None:
            raw.trainer.experiment_name = name
        return to_config(raw)
    except (HydraException, OmegaConfBaseException) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise ValueError(
            f"the preset '{name}' with the overrides {list(overrides)} does not compose: {reason}"
        ) from error


def to_config(raw: DictConfig) -> Config:
    """The typed config of what Hydra composed. Raises ValueError that lists every key still missing."""
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        raise ValueError(f"these keys need a value: {', '.join(missing)} (give them as key=value)")
    config = OmegaConf.to_object(raw)
    assert isinstance(config, Config)
    return config
