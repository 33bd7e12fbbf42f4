"""Shapers: pure functions that change advantages before the updates, such as by perception."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from verl.registry import Registry

if TYPE_CHECKING:
    from verl.config.algorithm import ShaperConfig


Columns = Mapping[str, torch.Tensor]
ShaperFunction = Callable[[Columns, Any], "tuple[torch.Tensor, dict[str, float]]"]


@dataclass(frozen=True)
class ShaperKind:
    """One registered kind of shaper; `requires` names the columns it reads, by its config."""

    name: str
    function: ShaperFunction
    config_class: type[ShaperConfig]
    requires: Callable[[Any], tuple[str, ...]]


@dataclass(frozen=True)
class AdvantageShaper:
    """A shaper as configured."""

    name: str
    kind: ShaperKind
    config: ShaperConfig

    @property
    def requires(self) -> tuple[str, ...]:
        return self.kind.requires(self.config)

    def __call__(self, columns: Columns) -> tuple[torch.Tensor, dict[str, float]]:
        """New advantages [B, T] of a whole step, and metrics by name."""
        return self.kind.function(columns, self.config)


SHAPERS: Registry[ShaperKind] = Registry("advantage shaper")


def advantage_shaper(
    name: str, config: type[ShaperConfig], requires: Callable[[Any], tuple[str, ...]]
) -> Callable[[ShaperFunction], ShaperFunction]:
    """Decorator: register a pure function `(columns, config) -> (advantages [B, T], metrics)` as `name`.

    It sees all rows of a step, with the columns that it `requires` and `advantages`. A log-prob column under a view is
    that of the policy before the updates. `config` joins Hydra's group `shaper`: `shaper@algorithm.shapers.x: name` in
    a preset adds it. Shapers run in the order in which they are listed.
    """
    from verl.config.store import store_option

    def add(function: ShaperFunction) -> ShaperFunction:
        SHAPERS.register(name)(ShaperKind(name, function, config, requires))
        store_option("shaper", name, config)
        return function

    return add


def build_shapers(configs: Mapping[str, ShaperConfig]) -> list[AdvantageShaper]:
    """The configured shapers, in order. Raises ValueError for an unknown kind."""
    return [AdvantageShaper(name, SHAPERS[config.kind], config) for name, config in configs.items()]
