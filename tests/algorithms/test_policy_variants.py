"""GSPO and CISPO against formulas written here on their own, in float64, and their gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from verl.algorithms.losses.compose import Denominators, reduce_values
from verl.algorithms.losses.policy import CISPOTermConfig, GSPOTermConfig
from verl.algorithms.losses.term import LOSS_TERMS, TermOutput
from verl.config.algorithm import LossAverage
from verl.config.option import check_options

B, T = 8, 6
LENGTHS = [6, 5, 4, 3, 2, 1, 6, 0]
WIDE = GSPOTermConfig(clip_ratio_low=0.1, clip_ratio_high=0.15)


def columns(spread: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    log_probs = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(B, T, generator=generator, dtype=torch.float64) * spread
    mask = torch.tensor([[int(t < length) for t in range(T)] for length in LENGTHS])
    advantages = torch.randn(B, 1, generator=generator, dtype=torch.float64)
    return {
        "log_probs": log_probs.requires_grad_(),
        "old_log_probs": (log_probs.detach() + noise),
        "advantages": advantages * mask,
        "response_mask": mask,
    }


def evaluate(config, cols) -> TermOutput:
    return LOSS_TERMS[config.kind].function(cols, config)


def sequence_ratio(cols, row: int) -> torch.Tensor:
    """(pi(y) / pi_old(y)) ** (1 / |y|), as the paper writes it; a graph of log_probs."""
    length = LENGTHS[row]
    new, old = (cols[name][row, :length].exp().prod() for name in ("log_probs", "old_log_probs"))
    return (new / old) ** (1 / length)


def test_gspo_token_by_token():
    cols = columns()
    output = evaluate(WIDE, cols)
    clipped = {"high": 0, "low": 0}
    for row in range(B - 1):
        ratio, advantage = sequence_ratio(cols, row).item(), cols["advantages"][row, 0].item()
        expected = -min(ratio * advantage, min(max(ratio, 0.9), 1.15) * advantage)
        stopped = {"high": ratio > 1.15 and advantage > 0, "low": ratio < 0.9 and advantage < 0}
        for t in range(LENGTHS[row]):
            assert output.values[row, t].item() == pytest.approx(expected, abs=1e-12)
            for side, value in stopped.items():
                assert output.metrics[f"clip_frac_{side}"][row, t].item() == value
        clipped = {side: clipped[side] + stopped[side] for side in clipped}
    assert clipped["high"] and clipped["low"] and sum(clipped.values()) < B - 1


def test_gspo_gradient_over_sequences_is_that_of_the_sequence_objective():
    cols = columns()
    mask = cols["response_mask"]
    counts = Denominators(*Denominators.count(mask.sum(-1)).tolist(), T)
    loss = reduce_values(evaluate(WIDE, cols).values, mask, mask.sum(-1), LossAverage.seq, counts)
    (found,) = torch.autograd.grad(loss, cols["log_probs"])
    objective = []
    for row in range(B - 1):
        ratio, advantage = sequence_ratio(cols, row), cols["advantages"][row, 0]
        objective.append(torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage))
    (expected,) = torch.autograd.grad(-torch.stack(objective).mean(), cols["log_probs"])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert expected.abs().sum() > 0.01


def test_gspo_does_not_see_padding():
    cols = columns()
    valid = cols["response_mask"].bool()
    expected = evaluate(WIDE, cols).values[valid]
    cols["old_log_probs"] = cols["old_log_probs"].masked_fill(~valid, float("nan"))
    torch.testing.assert_close(evaluate(WIDE, cols).values[valid], expected)


def test_cispo_token_by_token_and_its_gradient():
    cols, config = columns(spread=1.0), CISPOTermConfig(clip_ratio_low=0.4, clip_ratio_high=0.5)
    output = evaluate(config, cols)
    (gradient,) = torch.autograd.grad(output.values.sum(), cols["log_probs"])
    high = low = 0
    for row in range(B):
        for t in range(T):
            log_prob, advantage = cols["log_probs"][row, t].item(), cols["advantages"][row, t].item()
            ratio = math.exp(log_prob - cols["old_log_probs"][row, t].item())
            weight = min(max(ratio, 0.6), 1.5)
            assert output.values[row, t].item() == pytest.approx(-weight * advantage * log_prob, abs=1e-12)
            assert gradient[row, t].item() == pytest.approx(-weight * advantage, abs=1e-12)
            assert output.metrics["clip_frac_high"][row, t].item() == (ratio > 1.5)
            assert output.metrics["clip_frac_low"][row, t].item() == (ratio < 0.6)
            high, low = high + (ratio > 1.5), low + (ratio < 0.6)
    assert high and low and high + low < B * T


def test_cispo_has_no_lower_bound_by_default():
    cols = columns(spread=4.0)
    assert (evaluate(CISPOTermConfig(), cols).metrics["clip_frac_low"] == 0).all()


@pytest.mark.parametrize("config", [GSPOTermConfig(), CISPOTermConfig()])
def test_on_policy_both_give_the_policy_gradient(config):
    cols = columns(spread=0.0)
    (gradient,) = torch.autograd.grad(evaluate(config, cols).values.sum(), cols["log_probs"])
    torch.testing.assert_close(gradient, -cols["advantages"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", [GSPOTermConfig(), CISPOTermConfig()])
@pytest.mark.parametrize("old", [-400.0, 400.0])
def test_extreme_log_ratios_stay_finite(config, old):
    cols = columns()
    cols = {name: column.detach().float() for name, column in cols.items()}
    cols["log_probs"].requires_grad_()
    cols["old_log_probs"] = torch.full((B, T), old)
    values = evaluate(config, cols).values
    (gradient,) = torch.autograd.grad(values.sum(), cols["log_probs"])
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("config", [GSPOTermConfig(), WIDE, CISPOTermConfig()])
def test_order_of_rows_does_not_matter(config):
    cols = columns()
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    shuffled = {name: column[order] for name, column in cols.items()}
    torch.testing.assert_close(evaluate(config, cols).values[order], evaluate(config, shuffled).values)


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
def test_either_takes_the_place_of_the_policy_term(kind):
    from verl.algorithms.losses.compose import build_terms
    from verl.algorithms.requirements import find_requirements

    config = {"gspo": GSPOTermConfig, "cispo": CISPOTermConfig}[kind]()
    (term,) = build_terms({"policy": config})
    assert (term.metric, config.coef, term.kind.sign) == ("actor/pg_loss", 1.0, 1)
    found = find_requirements([term], {}, {})
    assert found.old and not found.reference and not found.inert


@pytest.mark.parametrize(("key", "value"), [("clip_ratio_low", 1.5), ("clip_ratio_low", -0.1), ("clip_ratio_high", -1)])
@pytest.mark.parametrize("config_class", [GSPOTermConfig, CISPOTermConfig])
def test_clip_ranges_without_meaning_are_refused_by_key(config_class, key, value):
    with pytest.raises(ValueError, match=f"algorithm.terms.policy.{key}={value}"):
        check_options(config_class(**{key: value}), "algorithm.terms.policy")
