"""Loss terms: pure functions from columns to per-token values, and what each declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from verl.registry import Registry

if TYPE_CHECKING:
    from verl.config.algorithm import LossTermConfig
from verl.columns import view_column

Columns = Mapping[str, torch.Tensor]


@dataclass
class TermOutput:
    """`values` [B, T] enter the loss, `metrics` are further per-token values [B, T] to log, as name -> values."""

    values: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


TermFunction = Callable[[Columns, Any], "TermOutput | torch.Tensor"]


@dataclass(frozen=True)
class TermKind:
    """One registered kind of term.

    `requires` names the columns it reads, or computes them from the term's config. `sign` is +1 where the
    term's values are minimised and -1 where they are maximised: a coefficient in a config is then always
    positive, and the logged metric is always the natural quantity. `counted` gives, from config and columns, how
    many tokens [B] of each response the mean is taken over; the values of all others are 0.
    """

    name: str
    function: TermFunction
    config_class: type[LossTermConfig]
    requires: Callable[[Any], tuple[str, ...]]
    sign: float
    metric: str | None
    counted: Callable[[Any, Columns], torch.Tensor]


LOSS_TERMS: Registry[TermKind] = Registry("loss term")


def _all(config: Any, columns: Columns) -> torch.Tensor:
    return columns["response_mask"].sum(-1)


def loss_term(
    name: str,
    config: type[LossTermConfig],
    requires: tuple[str, ...] | Callable[[Any], tuple[str, ...]],
    maximize: bool = False,
    metric: str | None = None,
    counted: Callable[[Any, Columns], torch.Tensor] | None = None,
) -> Callable[[TermFunction], TermFunction]:
    """Decorator: register a pure function `(columns, config) -> [B, T] values` as the loss term `name`.

    Args:
        config: the dataclass of its options, a subclass of LossTermConfig; its `kind` must be `name`. It joins
            Hydra's group `term`, so `term@algorithm.terms.x: name` in a preset adds the term under the name x.
        requires: the columns it reads. Columns that no pass has to compute (`response_mask`, `advantages`) may
            be named too.
        maximize: its values are subtracted from the loss instead of added.
        counted: for a term that takes part of the tokens, (config, columns) -> [B] how many of each response. It reads
            `response_mask` and columns that are there before the update: the count is over the whole mini-batch.
        metric: the metric's name under `actor/`; by default the name that the term has in the config.
    """
    from verl.config.store import store_option

    def add(function: TermFunction) -> TermFunction:
        requires_of = requires if callable(requires) else lambda _config: tuple(requires)
        kind = TermKind(name, function, config, requires_of, -1.0 if maximize else 1.0, metric, counted or _all)
        LOSS_TERMS.register(name)(kind)
        store_option("term", name, config)
        return function

    return add


def only_view_rows(values: torch.Tensor, columns: Columns, view: str) -> torch.Tensor:
    """`values` [B, T] with zeros in the rows that the view does not cover (text-only prompts)."""
    return torch.where(columns[view_column(view, "rows")][:, None], values, 0.0)
