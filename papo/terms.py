"""The implicit perception loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.estimators import SAMPLED, Estimator
from verl.algorithms.losses.term import Columns, loss_term, only_view_rows
from verl.columns import view_column
from verl.config.algorithm import LossTermConfig
from verl.config.option import option


@dataclass
class PerceptionKLConfig(LossTermConfig):
    """The perception KL's options."""

    kind: str = "perception_kl"
    coef: float = option(0.01, "coefficient gamma", least=0)
    view: str = option("masked", "name of the corrupted view")
    estimator: Estimator = option(Estimator.k3, "k1, k2, k3, or full (over the vocabulary; needs a live view)")
    detach: bool = option(False, "keep the gradient out of the masked branch even where its view is live")
    cap: float | None = option(None, "tokens with a larger KL count as this and give no gradient", above=0)
    top_fraction: float = option(
        1.0, "share of a response's tokens that counts, those with the largest KL", above=0, most=1
    )
    incorrect_weight: float = option(1.0, "factor on the tokens of wrong responses; 0: correct ones alone", least=0)


def _full(config: PerceptionKLConfig) -> str:
    return view_column(config.view, "full_kl_detached" if config.detach else "full_kl")


def _requires(config: PerceptionKLConfig) -> tuple[str, ...]:
    if config.estimator == Estimator.full:
        read = [_full(config)]
    else:
        read = ["log_probs", view_column(config.view, "log_probs")]
    read += ["response_mask"] * (config.top_fraction < 1) + ["accuracy"] * (config.incorrect_weight != 1)
    return (*read, view_column(config.view, "rows"))


def _counted(config: PerceptionKLConfig, columns: Columns) -> torch.Tensor:
    """[B] how many tokens of each response count."""
    return count_of(columns["response_mask"], config.top_fraction)


def count_of(mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """[B] the number of tokens, rounded up, that are `fraction` of each response of `mask` [B, T]."""
    return torch.ceil(mask.sum(-1).double() * fraction).long()


def largest_tokens(values: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """[B, T] bool: the share `fraction` of each response's tokens with the largest `values`, the earlier of equals."""
    order = values.masked_fill(mask == 0, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < count_of(mask, fraction)[:, None]


@loss_term("perception_kl", PerceptionKLConfig, requires=_requires, maximize=True, counted=_counted)
def perception_kl(columns: Columns, config: PerceptionKLConfig) -> torch.Tensor:
    """KL(pi_theta || pi_mask) per token (arXiv 2507.06448, eq. 2), maximised.

    The ratio of the sampled estimators is pi_mask / pi_theta, as in the released code: for tokens drawn from pi_theta
    it makes k3 an unbiased estimate of that KL. The paper prints the inverse, which estimates chi-squared minus KL.
    """
    if config.estimator == Estimator.full:
        values = columns[_full(config)]
    else:
        masked = columns[view_column(config.view, "log_probs")]
        values = SAMPLED[config.estimator](columns["log_probs"], masked.detach() if config.detach else masked)
    if config.cap is not None:
        values = torch.clamp(values, max=config.cap)
    if config.top_fraction < 1:
        values = torch.where(
            largest_tokens(values.detach(), columns["response_mask"], config.top_fraction), values, 0.0
        )
    if config.incorrect_weight != 1:
        values = values * torch.where(columns["accuracy"] > 0.5, 1.0, config.incorrect_weight)[:, None]
    return only_view_rows(values, columns, config.view)


@dataclass
class ViewKLConfig(PerceptionKLConfig):
    """Coefficient of a KL that is minimised. Choose a view that leaves what the answer needs."""

    kind: str = "view_kl"
    coef: float = option(0.01, "coefficient", least=0)
    view: str = option("noised", "name of the view")


@loss_term("view_kl", ViewKLConfig, requires=_requires, counted=_counted)
def view_kl(columns: Columns, config: ViewKLConfig) -> torch.Tensor:
    """KL(pi_theta || pi_view) per token, minimised: the policy is to answer alike given the noised image (DVRP, arXiv
    2601.06801). All but the sign is that of `perception_kl`."""
    return perception_kl(columns, config)
