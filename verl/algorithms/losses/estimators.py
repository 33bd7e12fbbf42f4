"""Per-token estimators of a KL divergence, KL(pi || other), from log-probs of sampled tokens.

What each one's gradient is in expectation over tokens drawn from pi, with respect to either policy
(tests/algorithms/test_divergences.py computes both sides):

| estimator | value | gradient of pi | gradient of other, where it is live |
|---|---|---|---|
| k1 | -log rho | 0 | that of KL(pi || other) |
| k2 | (log rho)^2 / 2 | that of KL(pi || other) | that of E_pi[(log rho)^2] / 2 |
| k3 | rho - log rho - 1 | that of KL(other || pi) | that of KL(pi || other) |
| full | KL(pi || other) | its own | its own |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from verl.config.algorithm import Estimator

# exp(20) is the largest ratio that a float32 sum of a batch survives; a policy that far away is clipped anyway.
MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def k1(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """-log rho with rho = other / pi: unbiased for KL(pi || other), of either sign. Arguments as in `k3`."""
    return -_log_ratio(log_probs, other_log_probs)


def k2(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """(log rho)^2 / 2: biased, low variance, and the right gradient for pi. Arguments as in `k3`."""
    return 0.5 * _log_ratio(log_probs, other_log_probs) ** 2


def k3(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """rho - log rho - 1 with rho = other / pi, for tokens drawn from pi: unbiased for KL(pi || other), never
    negative, exactly 0 with gradient 0 where both agree (http://joschu.net/blog/kl-approx.html).

    The log-ratio is clamped to [-20, 20] and the value to at most 10, as in the released code of PAPO, so that one
    token cannot overflow a batch; beyond either the gradient is 0.

    Args:
        log_probs, other_log_probs: [B, T], of the same tokens.

    Returns:
        [B, T] in nats.
    """
    log_ratio = _log_ratio(log_probs, other_log_probs)
    # expm1 keeps the digits that exp(x) - 1 loses near 0, where policies that agree live.
    return torch.clamp(torch.expm1(log_ratio) - log_ratio, max=MAX_K3)


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """`log_ratio`, at most 20 either way; beyond that its gradient is 0."""
    return torch.clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_ratio(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    return bounded(other_log_probs - log_probs)


SAMPLED: dict[Estimator, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    Estimator.k1: k1,
    Estimator.k2: k2,
    Estimator.k3: k3,
}
