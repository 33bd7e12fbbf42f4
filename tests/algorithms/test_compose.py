"""The reduction: shares of micro-batches and ranks add up to the mean over the mini-batch."""

from __future__ import annotations

import math

import pytest
import torch

from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.compose import (
    Denominators,
    LossTerm,
    build_terms,
    coefficients,
    compute_losses,
    moving,
    reduce_values,
)
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.algorithms.losses.sft import SFTTermConfig
from verl.algorithms.losses.term import LOSS_TERMS, TermKind
from verl.config.algorithm import LossAverage, LossTermConfig, ScheduleConfig
from verl.metrics.bag import MetricBag

MAX_LENGTH = 20  # wider than any batch here: the constant is the config's, not the padding's


def batch(rows: int = 12, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    lengths[3] = 0  # an empty response counts neither as tokens nor as a sequence
    return values, (torch.arange(width)[None] < lengths[:, None]).long()


def counted(mask: torch.Tensor) -> Denominators:
    return Denominators(*Denominators.count(mask.sum(-1)).tolist(), MAX_LENGTH)


def by_hand(values: torch.Tensor, mask: torch.Tensor, average: LossAverage) -> float:
    rows = [
        [v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    if average == LossAverage.token:
        tokens = [v for row in rows for v in row]
        return sum(tokens) / len(tokens)
    means = [sum(row) / (MAX_LENGTH if average == LossAverage.seq_sum else len(row)) for row in rows if row]
    return sum(means) / len(means)


@pytest.mark.parametrize("average", list(LossAverage))
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_shares_of_any_cut_add_up_to_the_mean(average, size):
    values, mask = batch()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(size))
    denominators = counted(mask)
    shares = [
        reduce_values(v, m, m.sum(-1), average, denominators)
        for v, m in zip(values[order].split(size), mask[order].split(size), strict=True)
    ]
    assert sum(shares).item() == pytest.approx(by_hand(values, mask, average), abs=1e-13)


def test_means_of_micro_batch_means_would_be_something_else():
    values, mask = batch()
    naive = [by_hand(v, m, LossAverage.token) for v, m in zip(values.split(4), mask.split(4), strict=True)]
    assert abs(sum(naive) / 3 - by_hand(values, mask, LossAverage.token)) > 1e-3


def test_seq_sum_weighs_a_token_alike_whatever_the_length_of_its_response():
    values = torch.ones(2, 4, requires_grad=True)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    denominators = Denominators(tokens=4, sequences=2, max_length=8)
    share = reduce_values(values, mask, mask.sum(-1), LossAverage.seq_sum, denominators)
    share.backward()
    assert share.item() == (1 / 8 + 3 / 8) / 2
    torch.testing.assert_close(values.grad, mask / 16)


def test_padding_that_is_not_finite_does_not_reach_the_loss():
    values, mask = batch()
    values = values.masked_fill(mask == 0, float("nan")).requires_grad_()
    share = reduce_values(values, mask, mask.sum(-1), LossAverage.token, counted(mask))
    share.backward()
    assert torch.isfinite(share) and torch.isfinite(values.grad).all()


def as_configured(terms) -> dict[str, float]:
    """The coefficients of the config."""
    return coefficients(terms, 1, 1)


def test_a_coefficient_of_zero_gives_a_metric_and_no_loss():
    values, mask = batch()
    bag = MetricBag()
    terms = build_terms({"entropy": EntropyTermConfig(coef=0.0), "sharpen": EntropyTermConfig(coef=0.5)})
    denominators = dict.fromkeys(("entropy", "sharpen"), counted(mask))
    losses = compute_losses(
        terms, {"log_probs": values}, mask, LossAverage.token, denominators, bag, coefficients(terms, 1, 1)
    )
    assert list(losses) == ["sharpen"]
    mean = by_hand(-values, mask, LossAverage.token)
    assert losses["sharpen"].item() == pytest.approx(0.5 * mean)
    assert bag.result()["actor/entropy"] == pytest.approx(mean)


@pytest.mark.parametrize("average", list(LossAverage))
@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_term_over_part_of_the_tokens_is_averaged_over_those(average, size):
    """The mean of the 40 % largest of each response, however the batch is cut; upstream divides by all tokens."""
    values, mask = batch()
    values = values / 2  # k3 is cut off at 10
    columns = {
        "log_probs": torch.zeros_like(values),
        "masked_log_probs": values,
        "masked_rows": torch.ones(len(values), dtype=torch.bool),
        "response_mask": mask,
    }
    terms = build_terms({"kl": PerceptionKLConfig(coef=1.0, top_fraction=0.4)})
    denominators = {"kl": Denominators(*Denominators.count(terms[0].counted(columns)).tolist(), MAX_LENGTH)}
    bag, total = MetricBag(), 0.0
    for rows in torch.arange(len(values)).split(size):
        part = {name: column[rows] for name, column in columns.items()}
        total += compute_losses(terms, part, mask[rows], average, denominators, bag, as_configured(terms))["kl"].item()
    kept = []
    for row, length in zip((values.exp() - 1 - values).tolist(), mask.sum(-1).tolist(), strict=True):
        kept.append(sorted(row[:length], reverse=True)[: math.ceil(0.4 * length)])
    means = [sum(row) / len(row) for row in kept if row]
    tokens = [value for row in kept for value in row]
    sums = [sum(row) / MAX_LENGTH for row in kept if row]
    expected = {
        LossAverage.token: sum(tokens) / len(tokens),
        LossAverage.seq: sum(means) / len(means),
        LossAverage.seq_sum: sum(sums) / len(sums),
    }[average]
    assert total == pytest.approx(-expected, abs=1e-12)
    assert bag.result()["actor/kl"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-12)


def test_coefficients_of_the_step_replace_those_of_the_config():
    values, mask = batch()
    terms = build_terms({"sharpen": EntropyTermConfig(coef=0.5)})
    denominators = {"sharpen": counted(mask)}
    arguments = (terms, {"log_probs": values}, mask, LossAverage.token, denominators)
    full = compute_losses(*arguments, MetricBag(), as_configured(terms))["sharpen"]
    fifth = compute_losses(*arguments, MetricBag(), {"sharpen": 0.1})["sharpen"]
    assert fifth.item() == pytest.approx(full.item() / 5)


def test_coefficients_follow_schedule_and_scale_and_are_shown_where_they_move():
    ramp = ScheduleConfig(warmup_steps=3)
    terms = build_terms({"policy": PolicyTermConfig(coef=2.0, schedule=ramp), "kl": PerceptionKLConfig(coef=0.8)})
    assert coefficients(terms, 2, 9) == {"policy": 1.0, "kl": 0.8}
    assert moving(terms, coefficients(terms, 2, 9)) == {"actor/coef/policy": 1.0}
    assert moving(terms, coefficients(terms, 9, 9, scale=0.25)) == {"actor/coef/policy": 2.0, "actor/coef/kl": 0.2}


def test_a_term_that_reduces_is_refused_by_name():

    def greedy(columns, config):
        return columns["log_probs"].mean()

    kind = TermKind("greedy", greedy, LossTermConfig, lambda c: (), 1.0, None, lambda c, m: m.sum(-1))
    values, mask = batch()
    with pytest.raises(ValueError, match="loss term 'mine'.*one value per token"):
        compute_losses(
            [LossTerm("mine", kind, LossTermConfig("greedy", 1.0))],
            {"log_probs": values},
            mask,
            LossAverage.token,
            {"mine": Denominators(1, 1, 1)},
            MetricBag(),
            {"mine": 1.0},
        )


def test_unknown_terms_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="unknown loss term 'nope'; known: .*perception_kl"):
        LOSS_TERMS["nope"]


def test_metric_bags_merge_exactly():
    values, mask = batch()
    whole, parts = MetricBag(), []
    whole.add_tokens("x", values, mask)
    for v, m in zip(values.split(5), mask.split(5), strict=True):
        parts.append(MetricBag())
        parts[-1].add_tokens("x", v, m)
        parts[-1].add_max("peak", v.max().item())
    merged = MetricBag.merged(parts).result()
    assert merged["x"] == pytest.approx(whole.result()["x"], abs=1e-14)
    assert merged["peak"] == values.max().item()
    assert "never" not in merged


@pytest.mark.parametrize("size", [1, 3, 12])
def test_imitation_is_the_mean_over_the_tokens_of_correct_responses(size):
    """As in the released code, however the batch is cut; a batch without a correct response gives 0."""
    values, mask = batch()
    columns = {"log_probs": values, "accuracy": (torch.arange(len(values)) % 3 == 0).float(), "response_mask": mask}
    terms = build_terms({"sft": SFTTermConfig(coef=1.0)})
    denominators = {"sft": Denominators(*Denominators.count(terms[0].counted(columns)).tolist(), MAX_LENGTH)}
    bag, total = MetricBag(), 0.0
    for rows in torch.arange(len(values)).split(size):
        part = {name: column[rows] for name, column in columns.items()}
        total += compute_losses(
            terms, part, mask[rows], LossAverage.token, denominators, bag, coefficients(terms, 1, 1)
        )["sft"].item()
    expected = -by_hand(values[::3], mask[::3], LossAverage.token)
    assert total == pytest.approx(expected, abs=1e-13) and bag.result()["actor/sft"] == pytest.approx(expected)
    columns["accuracy"] = torch.zeros(len(values))
    none = {"sft": Denominators(*Denominators.count(terms[0].counted(columns)).tolist(), MAX_LENGTH)}
    bag = MetricBag()
    assert compute_losses(terms, columns, mask, LossAverage.token, none, bag, as_configured(terms))["sft"].item() == 0
    assert "actor/sft" not in bag.result()


def test_a_views_metrics_are_means_over_the_rows_that_it_covers():
    """A text-only row has no perception KL; its tokens count in the loss, whose mean is over all, and not here."""
    values, mask = batch()
    covered = torch.arange(len(values)) % 2 == 0
    columns = {"log_probs": torch.zeros_like(values), "masked_log_probs": values / 2, "masked_rows": covered}
    terms = build_terms(
        {"perception_kl": PerceptionKLConfig(coef=1.0), "masked_entropy": EntropyTermConfig(coef=1.0, view="masked")}
    )
    bag = MetricBag()
    losses = compute_losses(
        terms,
        columns,
        mask,
        LossAverage.token,
        dict.fromkeys(("perception_kl", "masked_entropy"), counted(mask)),
        bag,
        as_configured(terms),
    )
    kl, entropy = (values / 2).exp() - 1 - values / 2, -values / 2
    assert bag.result() == pytest.approx(
        {
            "actor/perception_kl": by_hand(kl[::2], mask[::2], LossAverage.token),
            "actor/masked_entropy": by_hand(entropy[::2], mask[::2], LossAverage.token),
        }
    )
    zeroed = torch.where(covered[:, None], kl, 0.0)
    assert losses["perception_kl"].item() == pytest.approx(-by_hand(zeroed, mask, LossAverage.token))
