"""Per-token estimators of a KL divergence from log-probs of sampled tokens."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def k3(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """rho - log rho - 1 with rho = other / pi, for tokens drawn from pi: unbiased for KL(pi || other), never
    negative, exactly 0 with gradient 0 where both agree (http://joschu.net/blog/kl-approx.html).

    With `other` detached its gradient is, in expectation, that of KL(other || pi); a live `other` receives the
    gradient of KL(pi || other). The log-ratio is clamped to [-20, 20] and the value to at most 10, as in the
    released code of PAPO, so that one token cannot overflow a batch; beyond either the gradient is 0.

    Args:
        log_probs, other_log_probs: [B, T], of the same tokens.

    Returns:
        [B, T] in nats.
    """
    log_ratio = torch.clamp(other_log_probs - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses near 0, where policies that agree live.
    return torch.clamp(torch.expm1(log_ratio) - log_ratio, max=MAX_K3)
