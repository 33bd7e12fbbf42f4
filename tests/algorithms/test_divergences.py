"""Which divergence's gradient each estimator gives, in expectation over tokens drawn from pi: the table of Estimator.

Both sides are computed: the expectation of the estimator's gradient, as a sum over the vocabulary weighted by pi, and
autograd of the divergence written down.
"""

from __future__ import annotations

import pytest
import torch

from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.estimators import Estimator
from verl.algorithms.losses.term import LOSS_TERMS
from verl.models.log_probs import chunked_entropy, chunked_kl

V = 7


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of pi and of the policy given the masked image."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(p, 0), torch.log_softmax(q, 0)
    return (p.exp() * (p - q)).sum()


def half_squared(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(p, 0), torch.log_softmax(q, 0)
    return (p.exp() * (p - q) ** 2).sum() / 2


DIVERGENCES = {
    "none": lambda pi, masked: 0.0 * (pi.sum() + masked.sum()),
    "forward": lambda pi, masked: kl(pi, masked),
    "reverse": lambda pi, masked: kl(masked, pi),
    "squared": half_squared,
}

# estimator: (whose gradient it gives pi, whose it gives a live masked branch)
TABLE = {"k1": ("none", "forward"), "k2": ("forward", "squared"), "k3": ("reverse", "forward")}


def gradients(value: torch.Tensor, pi: torch.Tensor, masked: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(value, [pi, masked], allow_unused=True)
    return [torch.zeros(V, dtype=torch.float64) if g is None else g for g in found]


def expectation(estimator: str, detach: bool, pi: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """sum over tokens of pi(token), held fixed, times the term's value for that token."""
    columns = {
        "log_probs": torch.log_softmax(pi, 0)[None],
        "masked_log_probs": torch.log_softmax(masked, 0)[None],
        "masked_rows": torch.tensor([True]),
    }
    values = LOSS_TERMS["perception_kl"].function(
        columns, PerceptionKLConfig(estimator=Estimator(estimator), detach=detach)
    )
    return (torch.softmax(pi, 0).detach() * values[0]).sum()


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "live"])
@pytest.mark.parametrize("estimator", TABLE)
def test_expected_gradient_of_each_estimator(estimator, detach):
    pi, masked = policies()
    found = gradients(expectation(estimator, detach, pi, masked), pi, masked)
    of_pi, of_masked = (gradients(DIVERGENCES[name](pi, masked), pi, masked) for name in TABLE[estimator])
    torch.testing.assert_close(found[0], of_pi[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], torch.zeros_like(pi) if detach else of_masked[1], atol=1e-12, rtol=0)


def test_the_rows_of_the_table_are_different_gradients():
    pi, masked = policies()
    by_name = {name: gradients(function(pi, masked), pi, masked) for name, function in DIVERGENCES.items()}
    for place, names in ((0, ("none", "forward", "reverse")), (1, ("forward", "squared"))):
        for i, name in enumerate(names):
            for other in names[i + 1 :]:
                assert (by_name[name][place] - by_name[other][place]).abs().max() > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_the_value_and_k2_is_not(estimator):
    pi, masked = policies()
    assert expectation(estimator, True, pi, masked).item() == pytest.approx(kl(pi, masked).item(), abs=1e-12)
    assert abs(expectation("k2", True, pi, masked).item() - kl(pi, masked).item()) > 0.01


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "live"])
def test_the_full_kl_is_the_divergence_itself_with_its_own_gradient(detach):
    """In float32, over a vocabulary with banned tokens, at a temperature, in chunks."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(V + 2, 4, generator=generator).requires_grad_()
    hidden, other = (torch.randn(8, 4, generator=generator).requires_grad_() for _ in range(2))
    found = chunked_kl(hidden, other, lambda h: h @ weight.T, 0.7, torch.tensor([1, 5]), 3, detach)
    allowed = [v for v in range(V + 2) if v not in (1, 5)]
    logits, masked = (((h.double() @ weight.double().T) / 0.7)[:, allowed] for h in (hidden, other))
    masked = masked.detach() if detach else masked
    expected = torch.stack([kl(p, q) for p, q in zip(logits, masked, strict=True)])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    scale = torch.arange(1.0, 9)
    inputs = [hidden, weight] if detach else [hidden, weight, other]
    pairs = zip(
        torch.autograd.grad((found * scale).sum(), inputs),
        torch.autograd.grad((expected * scale).sum(), inputs),
        strict=True,
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_full_entropy_has_the_gradient_that_the_sampled_one_has_not():
    pi, _ = policies()
    log_probs = torch.log_softmax(pi, 0)
    sampled = LOSS_TERMS["entropy"].function({"log_probs": log_probs[None]}, EntropyTermConfig())[0]
    (of_sampled,) = torch.autograd.grad((log_probs.exp().detach() * sampled).sum(), pi, retain_graph=True)
    torch.testing.assert_close(of_sampled, torch.zeros_like(pi), atol=1e-12, rtol=0)
    entropy = -(log_probs.exp() * log_probs).sum()
    (wanted,) = torch.autograd.grad(entropy, pi)
    logits = pi.detach().float().requires_grad_()
    found = chunked_entropy(logits[None], lambda h: h, 1.0, torch.tensor([], dtype=torch.int64), 10)
    (got,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found.double()[0], entropy, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)
    assert wanted.abs().max() > 0.05
