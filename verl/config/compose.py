"""Composition: a preset's name and `key=value` overrides become the typed config."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.config import Config
from verl.config.keys import nearest, nearest_keys
from verl.config.store import GROUPS, store_schema
from verl.plugins import load_plugins


def _tokens_of_rows(rows: int, *, _root_: Any) -> int:
    """`${tokens_of_rows:4}`: tokens of four of the longest rows, for micro-batches that are given in rows."""
    return rows * (_root_.data.max_prompt_length + _root_.data.max_response_length)


OmegaConf.register_new_resolver("tokens_of_rows", _tokens_of_rows, replace=True)
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
    names = presets(config_dir)
    if name not in names:
        if not names:
            raise ValueError(f"there is no preset in {config_dir}: name another --config-dir")
        raise ValueError(f"there is no preset '{name}' in {config_dir}: {nearest(name, names)}")
    with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
        try:
            raw = compose(name, overrides=list(overrides))
            if raw.trainer.experiment_name is None:
                raw.trainer.experiment_name = name
            return to_config(raw)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"preset {name}: {_in_one_line(error, name, overrides)}") from error


def _in_one_line(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """The mistake in one line, with the nearest correct name. Call it inside the config folder's context."""
    text = str(error)
    if group := re.search(r"Could not (?:find|override) '([\w/]*?)/?(\w+)'", text):
        place, option = group.groups()
        if place in GROUPS:
            return f"there is no {place} '{option}': {nearest(option, sorted(GROUPS[place]))}"
    reason = (getattr(error.__cause__ or error, "msg", None) or str(error.__cause__ or error)).splitlines()[0]
    entries = [override for override in overrides if "@" in override.partition("=")[0]]  # of groups: they add keys
    try:
        known = _leaves(OmegaConf.to_container(compose(name, overrides=entries), resolve=False))
    except (HydraException, OmegaConfBaseException):  # the preset itself is at fault
        return " ".join(text.split())
    for override in overrides:
        key, given, _ = override.lstrip("+~").partition("=")
        if given and "@" not in key and key not in known and not any(k.startswith(f"{key}.") for k in known):
            return f"there is no key {key}: {nearest_keys(key, known)}"
    at_fault = [
        override for override in overrides if str(getattr(error.__cause__ or error, "full_key", "")) in override
    ]
    return f"{(at_fault or ['a file'])[-1]}: {reason}"


def _leaves(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in node.items():
        key = f"{prefix}{name}"
        found += _leaves(value, f"{key}.") if isinstance(value, Mapping) and value else [key]
    return found


def to_config(raw: DictConfig) -> Config:
    """The typed config of what Hydra composed. Raises ValueError that lists every key still missing."""
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        raise ValueError(f"these keys need a value: {', '.join(missing)} (give them as key=value)")
    config = OmegaConf.to_object(raw)
    assert isinstance(config, Config)
    return config
