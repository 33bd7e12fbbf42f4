"""One shaper for the methods that weigh tokens by what they owe to the image: a score, a selection and a weight.

VPPO (arXiv 2510.09285), PGPO (arXiv 2604.01840), ToR (arXiv 2603.25077) and VEPO (arXiv 2606.03937) are settings of it
(configs/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from papo.terms import largest_tokens
from verl.algorithms.losses.estimators import k3
from verl.algorithms.shapers import Columns, advantage_shaper
from verl.columns import view_column
from verl.config.algorithm import ShaperConfig
from verl.config.option import option

SAME = 1e-6  # mean scores of responses that differ by less are alike


class Score(StrEnum):
    """Measure of a token; see `score_of`."""

    kl = "kl"
    full_kl = "full_kl"
    log1p_kl = "log1p_kl"
    log_prob_diff = "log_prob_diff"
    jsd = "jsd"
    entropy = "entropy"
    entropy_diff = "entropy_diff"
    vision_entropy = "vision_entropy"


class Weight(StrEnum):
    """Factor on a token's advantage; see `tokens`."""

    chosen = "chosen"
    ramp = "ramp"


@dataclass
class TokensConfig(ShaperConfig):
    """A score, a selection and a weight."""

    kind: str = "tokens"
    view: str = option("masked", "name of the corrupted view")
    score: Score = option(
        Score.kl,
        "kl (k3), full_kl, log1p_kl (log(1 + kl)), log_prob_diff, jsd, entropy, entropy_diff, or vision_entropy (that "
        "times how much jsd or entropy_diff there is)",
    )
    weight: Weight = option(
        Weight.chosen, "chosen: 1 for the tokens with the largest score, 0 for others; ramp: grows with the score"
    )
    top_fraction: float = option(0.3, "share of a response's tokens that is chosen", above=0, most=1)
    second_score: Score | None = option(None, "another score, whose largest tokens count too")
    second_fraction: float = option(0.3, "share of a response's tokens that it chooses", above=0, most=1)
    second_weight: float = option(0.5, "weight of what it alone has chosen", least=0)
    min_scale: float | None = option(
        None, "factor on the response with the least mean score; null: all responses count alike", least=0, most=1
    )
    threshold: float = option(
        0.4, "ramp: the score, from 0 to 1 in a response, from which a weight is above 1", above=0, below=1
    )
    boost: float = option(2.0, "ramp: how far above, at most, before the mean is made 1", least=0)

    def check(self, key: str) -> None:
        if self.weight == Weight.ramp and self.second_score is not None:
            raise ValueError(f"{key}.second_score chooses tokens, and {key}.weight=ramp chooses none")


READS = {
    Score.kl: ("old_log_probs", "log_probs"),
    Score.log1p_kl: ("old_log_probs", "log_probs"),
    Score.log_prob_diff: ("old_log_probs", "log_probs"),
    Score.full_kl: ("full_kl",),
    Score.jsd: ("full_jsd",),
    Score.entropy: ("",),
    Score.entropy_diff: ("", "full_entropy"),
    Score.vision_entropy: ("", "full_entropy", "full_jsd"),
}


def _requires(config: TokensConfig) -> tuple[str, ...]:
    found = ["response_mask", view_column(config.view, "rows")]
    for score in filter(None, (config.score, config.second_score)):
        for name in READS[score]:
            own = {"": "full_entropy", "old_log_probs": "old_log_probs"}
            found.append(own[name] if name in own else view_column(config.view, name))
    return tuple(dict.fromkeys(found))


def score_of(score: Score, columns: Columns, view: str) -> torch.Tensor:
    """The score [B, T] of each token, 0 at padding.

    `kl` is the k3 estimate of KL(pi || pi_view), `full_kl` that KL, `log_prob_diff` |log pi - log pi_view|, `jsd` the
    Jensen-Shannon divergence of both, `entropy` H of pi, `entropy_diff` |H - H_view|. `vision_entropy` is
    (1 - (1 - a)(1 - b)) H with a = jsd / log 2 and b = entropy_diff over its largest in the response: high where a
    token is both open and changed by the image.
    """
    mask = columns["response_mask"].bool()

    def of_view(what: str) -> torch.Tensor:
        return torch.where(mask, columns[view_column(view, what)], 0.0)

    def entropy() -> torch.Tensor:
        return torch.where(mask, columns["full_entropy"], 0.0)

    def entropy_diff() -> torch.Tensor:
        return (entropy() - of_view("full_entropy")).abs()

    if score in (Score.kl, Score.log1p_kl, Score.log_prob_diff):
        own, seen = torch.where(mask, columns["old_log_probs"], 0.0), of_view("log_probs")
        if score == Score.log_prob_diff:
            return (own - seen).abs()
        return k3(own, seen) if score == Score.kl else torch.log1p(k3(own, seen))
    if score == Score.full_kl:
        return of_view("full_kl")
    if score == Score.jsd:
        return of_view("full_jsd")
    if score == Score.entropy:
        return entropy()
    if score == Score.entropy_diff:
        return entropy_diff()
    change = entropy_diff()
    change = change / change.amax(-1, keepdim=True).clamp(min=1e-9)
    return (1 - (1 - of_view("full_jsd") / math.log(2)) * (1 - change)) * entropy()


@advantage_shaper("tokens", TokensConfig, requires=_requires)
def tokens(columns: Columns, config: TokensConfig) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages [B, T] times each token's weight.

    `chosen`: 1 for the share `top_fraction` of a response's tokens with the largest score, `second_weight` for those
    that the second score alone has chosen, 0 for the others, which stay in the loss's denominator. `ramp` (PGPO): with
    I the score from 0 to 1 in its response, I / threshold up to the threshold, then 1 + boost (I - threshold) /
    (1 - threshold), and all divided by their mean over the response, so that a response's weights have the mean 1.
    With `min_scale` (VPPO) responses are scaled as well, see `response_scale`. Rows that the view does not cover keep
    their advantages.
    """
    mask, seen = columns["response_mask"].bool(), columns[view_column(config.view, "rows")]
    values = score_of(config.score, columns, config.view)
    if config.weight == Weight.chosen:
        weights = largest_tokens(values, mask, config.top_fraction).float()
        if config.second_score is not None:
            other = largest_tokens(score_of(config.second_score, columns, config.view), mask, config.second_fraction)
            weights = torch.maximum(weights, config.second_weight * other)
    else:
        weights = ramp(values, mask, config.threshold, config.boost)
    metrics = {
        "score": values[mask & seen[:, None]].mean().item() if (mask & seen[:, None]).any() else 0.0,
        "weighted_fraction": (((weights > 0) & mask)[seen].sum() / mask[seen].sum().clamp(min=1)).item(),
        "weight_max": weights[mask].max().item() if mask.any() else 0.0,
    }
    if config.min_scale is not None:
        scale = response_scale(values, mask, seen, config.min_scale)
        weights, metrics["scale_max"] = weights * scale[:, None], scale.max().item()
    advantages = columns["advantages"]
    return torch.where(seen[:, None], advantages * weights.to(advantages.dtype), advantages), metrics


def response_scale(values: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor, least: float) -> torch.Tensor:
    """Factors [B] float32 on responses, `least` + x (most - least): x is a response's mean score, from 0 for the least
    to 1 for the largest of the step, and most makes the mean of all factors 1 (VPPO, section 3.2).

    The released code takes that mean over a micro-batch; here it is that of the step, so that the split does not
    matter. 1 for rows that the view does not cover, and where all scores are alike.
    """
    lengths, scale = mask.sum(-1), torch.ones(len(values), dtype=torch.float64)
    compared = seen & (lengths > 0)
    if compared.any():
        means = (values.double().sum(-1) / lengths.clamp(min=1))[compared]
        spread = means.max() - means.min()
        if spread > SAME:
            x = (means - means.min()) / spread
            scale[compared] = least + x * (1 - least) / x.mean()
    return scale.float()


def ramp(values: torch.Tensor, mask: torch.Tensor, threshold: float, boost: float) -> torch.Tensor:
    """[B, T] weights with the mean 1 over each response; 1 where all its tokens have the same value."""
    low = values.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
    spread = high - low
    place = torch.where(spread > 0, (values - low) / spread.clamp(min=1e-12), threshold)
    weights = torch.where(place <= threshold, place / threshold, 1 + boost * (place - threshold) / (1 - threshold))
    weights = torch.where(mask, weights, 0.0)
    return weights * mask.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-12)
