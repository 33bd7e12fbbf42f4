"""Log-probs without whole logits: values and gradients of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from verl.models.log_probs import chunked_log_probs, token_log_probs

BANNED = torch.tensor([2, 5])


def by_hand(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """float64, over the tokens that are not banned."""
    allowed = [v for v in range(logits.shape[1]) if v not in BANNED.tolist()]
    scaled = logits.double() / temperature
    return scaled[range(len(targets)), targets] - scaled[:, allowed].exp().sum(-1).log()


def inputs(n: int = 23):
    torch.manual_seed(1)
    hidden = torch.randn(n, 8, requires_grad=True)
    head = nn.Linear(8, 11, bias=False)
    targets = torch.tensor([v for v in torch.randint(0, 11, (200,)).tolist() if v not in (2, 5)][:n])
    return hidden, head, targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk_size", [1, 7, 23, 1000])
def test_values_and_gradients_for_every_chunk_size(temperature, chunk_size):
    hidden, head, targets = inputs()
    expected = by_hand(head(hidden), targets, temperature)
    weights = torch.arange(1.0, 24)
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight])
    actual = chunked_log_probs(hidden, targets, head, temperature, BANNED, chunk_size)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    found = torch.autograd.grad((actual * weights).sum(), [hidden, head.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_probabilities_of_allowed_tokens_sum_to_one():
    logits = torch.randn(1, 11)
    total = sum(token_log_probs(logits, torch.tensor([v]), 1.0, BANNED).exp() for v in range(11) if v not in (2, 5))
    assert total.item() == pytest.approx(1.0, abs=1e-6)
    assert token_log_probs(logits, torch.tensor([2]), 1.0, BANNED).item() == float("-inf")


def test_only_one_chunk_of_logits_exists_at_a_time():
    hidden, head, targets = inputs()
    sizes = []
    chunked_log_probs(hidden, targets, lambda h: sizes.append(len(h)) or head(h), 1.0, BANNED, 5).sum().backward()
    assert max(sizes) == 5 and len(sizes) == 10  # 5 chunks forward, 5 again backward
