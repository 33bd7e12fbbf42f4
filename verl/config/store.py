"""Hydra's ConfigStore: the one schema, and the groups that plugins add options to."""

from __future__ import annotations

import functools

from hydra.core.config_store import ConfigStore

SCHEMA = "schema"
GROUPS: dict[str, dict[str, type]] = {}  # group -> name -> dataclass of its options


def store_option(group: str, name: str, config_class: type) -> None:
    """Offer `config_class` as `group@some.key=name`, in presets and on the command line."""
    GROUPS.setdefault(group, {})[name] = config_class
    ConfigStore.instance().store(group=group, name=name, node=config_class, provider="verl")


@functools.cache
def store_schema() -> None:
    """Offer the whole config as `schema`, the first entry of every preset's defaults list, and further rewards as
    `reward@worker.reward.extra.NAME=function`."""
    from verl.config.config import Config
    from verl.config.worker import RewardFunctionConfig

    store_option("reward", "function", RewardFunctionConfig)
    ConfigStore.instance().store(name=SCHEMA, node=Config, provider="verl")
