"""Loss and gradients against the released code's formula, written here on its own from the paper's facts.

GRPO and DAPO, with and without PAPO, in float64, on one batch. The released code divides by the tokens of a micro-batch
and not by those of the mini-batch: the two agree where the mini-batch is not cut, as here.
"""

from __future__ import annotations

import pytest
import torch

from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.compose import Denominators, build_terms, coefficients, compute_losses
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.algorithms.losses.ref_kl import RefKLTermConfig
from verl.config.algorithm import LossAverage
from verl.metrics.bag import MetricBag

B, T = 6, 11
# name: clip low, clip high, beta, gamma, eta1, eta2 (table 6 of the paper; the entropies of the 7B column)
SETTINGS = {
    "grpo": (0.2, 0.3, 0.01, 0.0, 0.0, 0.0),
    "dapo": (0.2, 0.28, 0.0, 0.0, 0.0, 0.0),
    "papo_g": (0.2, 0.3, 0.01, 0.02, 0.05, 0.05),
    "papo_d": (0.2, 0.28, 0.0, 0.01, 0.03, 0.03),
}


def batch(spread: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)

    def noise() -> torch.Tensor:
        return spread * torch.randn(B, T, generator=generator, dtype=torch.float64)

    base = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
    return {
        "log_probs": base.clone().requires_grad_(),
        "masked_log_probs": (base + noise()).requires_grad_(),
        "old_log_probs": base + noise(),
        "ref_log_probs": base + noise(),
        "advantages": torch.randn(B, 1, generator=generator, dtype=torch.float64).expand(B, T),
        "response_mask": (torch.arange(T)[None] < lengths).long(),
        "masked_rows": torch.ones(B, dtype=torch.bool),
    }


def released(columns, low, high, beta, gamma, eta1, eta2) -> torch.Tensor:
    """The sum that the released actor calls backward on."""
    mask = columns["response_mask"].double()

    def mean(values):
        return (values * mask).sum() / mask.sum()

    def low_var_kl(log_probs, other):
        difference = (other - log_probs).clamp(-20, 20)
        return (difference.exp() - difference - 1).clamp(-10, 10)

    log_probs, masked, advantages = columns["log_probs"], columns["masked_log_probs"], columns["advantages"]
    ratio = (log_probs - columns["old_log_probs"]).clamp(-20, 20).exp()
    first = -advantages * ratio
    second = -advantages * ratio.clamp(1 - low, 1 + high)
    third = -advantages * 3.0  # the dual clip
    higher = torch.maximum(first, second)
    loss = mean(torch.where(advantages < 0, torch.minimum(higher, third), higher))
    loss = loss + beta * mean(low_var_kl(log_probs, columns["ref_log_probs"]))
    loss = loss - gamma * mean(low_var_kl(log_probs, masked))
    return loss + eta1 * -mean(log_probs) + eta2 * -mean(masked)


def ours(columns, low, high, beta, gamma, eta1, eta2) -> torch.Tensor:
    terms = build_terms(
        {
            "policy": PolicyTermConfig(clip_ratio_low=low, clip_ratio_high=high),
            "ref_kl": RefKLTermConfig(coef=beta),
            "perception_kl": PerceptionKLConfig(coef=gamma),
            "entropy": EntropyTermConfig(coef=eta1),
            "masked_entropy": EntropyTermConfig(coef=eta2, view="masked"),
        }
    )
    mask = columns["response_mask"]
    denominators = {t.name: Denominators(*Denominators.count(t.counted(columns)).tolist(), T) for t in terms}
    coefs = coefficients(terms, 1, 1)
    return sum(compute_losses(terms, columns, mask, LossAverage.token, denominators, MetricBag(), coefs).values())


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_the_released_formula(name, spread):
    found, expected = (function(batch(spread), *SETTINGS[name]) for function in (ours, released))
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    for column in ("log_probs", "masked_log_probs"):
        gradients = []
        for function in (ours, released):
            columns = batch(spread)
            loss = function(columns, *SETTINGS[name])
            (value,) = torch.autograd.grad(loss, columns[column], allow_unused=True, materialize_grads=True)
            gradients.append(value)
        torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)
    if name.startswith("papo"):
        assert gradients[0].abs().max() > 1e-4  # the masked branch trains


def test_in_the_released_default_the_masked_branch_is_detached_and_its_entropy_inert():
    """Same formula, masked log-probs stored: what is left of PAPO is the pull of gamma (1 - rho) and of eta1."""
    columns = batch(0.5)
    columns["masked_log_probs"] = columns["masked_log_probs"].detach()
    with_entropy, without = SETTINGS["papo_g"], (*SETTINGS["papo_g"][:5], 0.0)
    gradients = [torch.autograd.grad(ours(columns, *s), columns["log_probs"])[0] for s in (with_entropy, without)]
    assert torch.equal(*gradients)
