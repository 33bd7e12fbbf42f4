"""The one place where terms are reduced and added: loss = sum of sign * coef * reduce(values, mask, denominators)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from verl.algorithms.losses.term import LOSS_TERMS, Columns, TermKind, TermOutput
from verl.columns import is_view_rows
from verl.config.algorithm import LossAverage, LossTermConfig, ScheduleConfig
from verl.metrics.bag import MetricBag


@dataclass(frozen=True)
class LossTerm:
    """A term as configured: its name in the config, its kind and its options."""

    name: str
    kind: TermKind
    config: LossTermConfig

    @property
    def metric(self) -> str:
        return f"actor/{self.kind.metric or self.name}"

    @property
    def requires(self) -> tuple[str, ...]:
        return self.kind.requires(self.config)

    def counted(self, columns: Columns) -> torch.Tensor:
        """[B] how many tokens of each response the term's mean is taken over."""
        return self.kind.counted(self.config, columns)

    def observed(self, columns: Columns) -> torch.Tensor:
        """[B] how many of those the term has a value for: none in a row that its view does not cover."""
        counted = self.counted(columns)
        for name in filter(is_view_rows, self.requires):
            counted = counted * columns[name]
        return counted

    def coef(self, step: int, total_steps: int) -> float:
        """The coefficient in step `step`, counted from 1."""
        return self.config.coef * self.config.schedule.factor(step, total_steps)


def build_terms(configs: Mapping[str, LossTermConfig]) -> list[LossTerm]:
    """The configured terms, in order. Raises ValueError for an unknown kind."""
    return [LossTerm(name, LOSS_TERMS[config.kind], config) for name, config in configs.items()]


def coefficients(terms: Sequence[LossTerm], step: int, total_steps: int, scale: float = 1.0) -> dict[str, float]:
    """The coefficient of each term in step `step`, counted from 1; `scale` multiplies those of maximised terms."""
    return {t.name: (scale if t.kind.sign < 0 else 1.0) * t.coef(step, total_steps) for t in terms}


def moving(terms: Sequence[LossTerm], coefs: Mapping[str, float]) -> dict[str, float]:
    """`coefs` as metrics, of the terms whose coefficient has a schedule or is not that of the config."""
    schedule = ScheduleConfig()
    moved = (t for t in terms if t.config.schedule != schedule or coefs[t.name] != t.config.coef)
    return {f"actor/coef/{term.name}": coefs[term.name] for term in moved}


@dataclass(frozen=True)
class Denominators:
    """Tokens and sequences of one whole mini-batch that a term counts, over all micro-batches and ranks, and the
    constant length in tokens that `seq_sum` divides by, which no batch changes."""

    tokens: float
    sequences: float
    max_length: int

    @staticmethod
    def count(counted: torch.Tensor) -> torch.Tensor:
        """[tokens, sequences] from the counted tokens [B] of each response; add these over ranks, then make a
        Denominators of the sum."""
        return torch.stack([counted.sum(), (counted > 0).sum()]).double()


def reduce_values(
    values: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor, average: LossAverage, denominators: Denominators
) -> torch.Tensor:
    """This part's share of the mini-batch mean of `values` [B, T] over `mask` [B, T]; shares add up to the mean.

    `token`: every token of the `counted` [B] ones counts alike. `seq`: the mean of each sequence's own mean.
    `seq_sum`: the mean of each sequence's sum / max_length, so that a token of a long response counts no less than one
    of a short response, whatever else is in the batch (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    # where, not a product: a value that is not finite at a padded position must not reach the loss.
    valid = torch.where(mask.bool(), values, 0.0)
    if average == LossAverage.token:
        return valid.sum() / max(denominators.tokens, 1.0)
    lengths = denominators.max_length if average == LossAverage.seq_sum else counted.clamp(min=1)
    per_sequence = valid.sum(-1) / lengths
    return per_sequence.sum() / max(denominators.sequences, 1.0)


def compute_losses(
    terms: list[LossTerm],
    columns: Columns,
    mask: torch.Tensor,
    average: LossAverage,
    denominators: Mapping[str, Denominators],
    metrics: MetricBag,
    coefs: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """Each term's signed, weighted share of the loss, as name -> scalar; the loss is their sum.

    Token sums of every term's values and further metrics are added to `metrics`: the mean of a view's term is that over
    the rows which the view covers, while its loss counts all. A term with coefficient 0 is
    computed for its metric alone and left out of the result.

    Args:
        columns: what the terms read.
        mask: [B, T].
        denominators: of each term, by its name.
        coefs: Coefficients in this step, by name.
    """
    losses = {}
    columns = {**columns, "response_mask": mask}
    for term in terms:
        with torch.set_grad_enabled(torch.is_grad_enabled() and term.config.coef != 0):
            output = term.kind.function(columns, term.config)
            output = output if isinstance(output, TermOutput) else TermOutput(output)
        if output.values.shape != mask.shape:
            raise ValueError(
                f"loss term '{term.name}' returned values of shape {tuple(output.values.shape)}; a term returns "
                f"one value per token, {tuple(mask.shape)}, and leaves the reduction to the framework"
            )
        total = torch.where(mask.bool(), output.values.detach(), 0.0).double().sum()
        metrics.add(term.metric, total.item(), term.observed(columns).sum().item())
        for name, values in output.metrics.items():
            metrics.add_tokens(f"actor/{name}", values.detach(), mask)
        if term.config.coef != 0:
            share = reduce_values(output.values, mask, term.counted(columns), average, denominators[term.name])
            losses[term.name] = term.kind.sign * coefs[term.name] * share
    return losses
