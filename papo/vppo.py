"""VPPO (arXiv 2510.09285): the policy gradient of the tokens, and of the responses, that depend on the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from papo.terms import largest_tokens
from verl.algorithms.losses.estimators import k3
from verl.algorithms.shapers import Columns, advantage_shaper
from verl.columns import view_column
from verl.config.algorithm import ShaperConfig
from verl.config.option import option

SAME = 1e-6  # nats per token; responses whose dependency differs by less are alike


@dataclass
class VPPOConfig(ShaperConfig):
    """VPPO's options."""

    kind: str = "vppo"
    view: str = option("masked", "name of the corrupted view")
    top_fraction: float = option(0.4, "share of a response's tokens that keeps its advantage", above=0, most=1)
    min_scale: float = option(0.9, "factor on the response that depends least on the image", least=0, most=1)


def _requires(config: VPPOConfig) -> tuple[str, ...]:
    return ("old_log_probs", view_column(config.view, "log_probs"), view_column(config.view, "rows"), "response_mask")


@advantage_shaper("vppo", VPPOConfig, requires=_requires)
def vppo(columns: Columns, config: VPPOConfig) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages [B, T], scaled by response and 0 for all but the tokens with the largest visual dependency.

    A token's dependency is the k3 estimate of KL(pi || pi_masked), a response's their mean. A response is scaled by
    `min_scale` + x (max - min_scale): x is its dependency, from 0 for the least to 1 for the largest of the step, and
    max makes the mean of all factors 1 (section 3.2). The released code takes that mean over a micro-batch; here it is
    that of the step, so that the split does not matter. Tokens without an advantage stay in the loss's denominator, as
    there. Rows that the view does not cover, having no image, keep their advantages.
    """
    mask, seen = columns["response_mask"].bool(), columns[view_column(config.view, "rows")]
    advantages = columns["advantages"]
    values = torch.where(mask, k3(columns["old_log_probs"], columns[view_column(config.view, "log_probs")]), 0.0)
    lengths = mask.sum(-1)
    chosen = largest_tokens(values, mask, config.top_fraction)

    scale = torch.ones(len(values), dtype=torch.float64)
    dependency = values.double().sum(-1) / lengths.clamp(min=1)
    compared = seen & (lengths > 0)
    if compared.any():
        least, largest = dependency[compared].min(), dependency[compared].max()
        if largest - least > SAME:
            x = (dependency[compared] - least) / (largest - least)
            scale[compared] = config.min_scale + x * (1 - config.min_scale) / x.mean()
    shaped = torch.where(chosen, advantages * scale.float()[:, None], 0.0)
    metrics = {
        "dependency": dependency[compared].mean().item() if compared.any() else 0.0,
        "scale_max": scale.max().item(),
        "chosen_fraction": ((chosen & mask)[seen].sum() / mask[seen].sum().clamp(min=1)).item(),
    }
    return torch.where(seen[:, None], shaped, advantages), metrics
