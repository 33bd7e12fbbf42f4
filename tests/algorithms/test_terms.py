"""Every loss term against a formula written here on its own, in float64, and its gradient against autograd of that."""

from __future__ import annotations

import math

import pytest
import torch

from papo.terms import PerceptionKLConfig, ViewKLConfig
from verl.algorithms.losses.entropy import EntropyEstimator, EntropyTermConfig
from verl.algorithms.losses.estimators import Estimator
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.algorithms.losses.ref_kl import RefKLTermConfig
from verl.algorithms.losses.sft import SFTTermConfig
from verl.algorithms.losses.term import LOSS_TERMS, TermOutput
from verl.algorithms.rewards import view_reward
from verl.config.algorithm import Truncation, ViewRewardConfig

B, T = 5, 7


def columns(seed: int = 0, spread: float = 0.6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def log_probs() -> torch.Tensor:
        return -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3

    base = log_probs()
    noise = [torch.randn(B, T, generator=generator, dtype=torch.float64) * spread for _ in range(3)]
    return {
        "log_probs": base.clone().requires_grad_(),
        "old_log_probs": base + noise[0],
        "ref_log_probs": base + noise[1],
        "masked_log_probs": (base + noise[2]).requires_grad_(),
        "masked_rows": torch.tensor([True, True, False, True, True]),
        "advantages": torch.randn(B, T, generator=generator, dtype=torch.float64),
    }


def evaluate(config, cols) -> TermOutput:
    output = LOSS_TERMS[config.kind].function(cols, config)
    return output if isinstance(output, TermOutput) else TermOutput(output)


def policy_by_hand(log_prob, old, advantage, low, high, dual):
    """One token, in plain Python."""
    ratio = math.exp(log_prob - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, clipped * advantage)
    if advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@pytest.mark.parametrize("spread", [0.1, 0.6, 2.0])
def test_policy_loss_token_by_token(spread):
    cols, config = columns(spread=spread), PolicyTermConfig(clip_ratio_low=0.2, clip_ratio_high=0.28)
    values = evaluate(config, cols).values
    for b in range(B):
        for t in range(T):
            expected = policy_by_hand(
                cols["log_probs"][b, t].item(),
                cols["old_log_probs"][b, t].item(),
                cols["advantages"][b, t].item(),
                0.2,
                0.28,
                3.0,
            )
            assert values[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_policy_gradient_is_ratio_times_advantage_inside_the_clip_range_and_zero_outside():
    cols, config = columns(spread=0.6), PolicyTermConfig(clip_ratio_low=0.2, clip_ratio_high=0.3)
    (gradient,) = torch.autograd.grad(evaluate(config, cols).values.sum(), cols["log_probs"])
    ratio = (cols["log_probs"] - cols["old_log_probs"]).exp().detach()
    advantage = cols["advantages"]
    stopped = ((ratio > 1.3) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0)) | ((ratio > 3) & (advantage < 0))
    assert stopped.any() and not stopped.all()
    expected = torch.where(stopped, 0.0, -ratio * advantage)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_without_an_upper_clip_a_good_token_is_pushed_whatever_its_ratio():
    cols = columns(spread=2.0)
    open_above = evaluate(PolicyTermConfig(clip_ratio_low=0.2, clip_ratio_high=None), cols)
    (gradient,) = torch.autograd.grad(open_above.values.sum(), cols["log_probs"])
    ratio, advantage = (cols["log_probs"] - cols["old_log_probs"]).exp().detach(), cols["advantages"]
    assert ((ratio > 3) & (advantage > 0)).any() and not open_above.metrics["clip_frac_high"].any()
    good = advantage > 0
    torch.testing.assert_close(gradient[good], (-ratio * advantage)[good], atol=1e-12, rtol=0)
    closed = evaluate(PolicyTermConfig(clip_ratio_low=0.2, clip_ratio_high=0.3), cols).values
    torch.testing.assert_close(open_above.values[~good], closed[~good])


def test_policy_metrics_count_only_tokens_that_the_clip_stops():
    cols = columns(spread=0.6)
    metrics = evaluate(PolicyTermConfig(clip_ratio_low=0.2, clip_ratio_high=0.3), cols).metrics
    ratio = (cols["log_probs"] - cols["old_log_probs"]).exp()
    torch.testing.assert_close(metrics["clip_frac_high"].bool(), (ratio > 1.3) & (cols["advantages"] > 0))
    torch.testing.assert_close(metrics["clip_frac_low"].bool(), (ratio < 0.8) & (cols["advantages"] < 0))


@pytest.mark.parametrize("tis", ["token", "sequence"])
def test_truncated_importance_weights_multiply_the_policy_loss(tis):
    cols = columns()
    cols["rollout_log_probs"] = cols["old_log_probs"] + torch.linspace(-1, 1, B * T, dtype=torch.float64).view(B, T)
    cols["response_mask"] = (torch.arange(T)[None] < torch.tensor([[7], [3], [5], [1], [6]])).long()
    plain = evaluate(PolicyTermConfig(), cols)
    config = PolicyTermConfig(tis=Truncation(tis), tis_cap=1.5)
    assert set(LOSS_TERMS["policy"].requires(config)) >= {"rollout_log_probs", "old_log_probs"}
    output, capped = evaluate(config, cols), 0
    for b in range(B):
        for t in range(T):
            apart = [(cols["old_log_probs"] - cols["rollout_log_probs"])[b, i].item() for i in range(T)]
            length = int(cols["response_mask"][b].sum())
            weight = math.exp(apart[t] if tis == "token" else sum(apart[:length]))
            capped += weight > 1.5
            expected = min(weight, 1.5) * plain.values[b, t].item()
            assert output.values[b, t].item() == pytest.approx(expected, abs=1e-12)
    assert 0 < capped < B * T and output.metrics["tis_capped"].sum() == capped


def k3_by_hand(log_prob, other):
    rho = math.exp(other - log_prob)
    return rho - math.log(rho) - 1


def test_ref_kl_token_by_token_and_its_gradient():
    cols = columns()
    values = evaluate(RefKLTermConfig(), cols).values
    for b, t in ((0, 0), (2, 3), (4, 6)):
        expected = k3_by_hand(cols["log_probs"][b, t].item(), cols["ref_log_probs"][b, t].item())
        assert values[b, t].item() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), cols["log_probs"])
    rho = (cols["ref_log_probs"] - cols["log_probs"]).exp().detach()
    torch.testing.assert_close(gradient, 1 - rho, atol=1e-12, rtol=0)


def test_perception_kl_uses_masked_over_original_and_sends_gradient_into_both_views():
    cols = columns()
    values = evaluate(PerceptionKLConfig(), cols).values
    for b, t in ((0, 0), (1, 5), (4, 6)):
        expected = k3_by_hand(cols["log_probs"][b, t].item(), cols["masked_log_probs"][b, t].item())
        assert values[b, t].item() == pytest.approx(expected, abs=1e-12)
    original, masked = torch.autograd.grad(values.sum(), [cols["log_probs"], cols["masked_log_probs"]])
    rho = (cols["masked_log_probs"] - cols["log_probs"]).exp().detach()
    rows = cols["masked_rows"][:, None]
    torch.testing.assert_close(original, torch.where(rows, 1 - rho, 0.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(masked, torch.where(rows, rho - 1, 0.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_token_by_token_capped_detached_and_weighted(estimator):
    cols = columns()
    cols["accuracy"] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    options = {"estimator": Estimator(estimator), "detach": True, "cap": 0.15, "incorrect_weight": 0.25}
    values = evaluate(PerceptionKLConfig(**options), cols).values
    capped = 0
    for b in range(B):
        for t in range(T):
            log_rho = (cols["masked_log_probs"][b, t] - cols["log_probs"][b, t]).item()
            formula = {"k1": -log_rho, "k2": log_rho**2 / 2, "k3": math.exp(log_rho) - log_rho - 1}[estimator]
            capped += formula > 0.15
            weight = (0.0 if b == 2 else 1.0) * (0.25 if b in (1, 3) else 1.0)
            assert values[b, t].item() == pytest.approx(weight * min(formula, 0.15), abs=1e-12)
    assert 0 < capped < B * T
    own, masked = torch.autograd.grad(values.sum(), [cols["log_probs"], cols["masked_log_probs"]], allow_unused=True)
    assert masked is None and (own == 0).sum() >= capped and (own != 0).any()


def test_the_terms_over_the_whole_vocabulary_read_the_columns_of_the_forward():
    cols = columns()
    exact = {name: torch.rand(B, T) for name in ("full_entropy", "masked_full_entropy", "masked_full_kl")}
    exact["masked_full_kl_detached"] = torch.rand(B, T)
    rows = cols["masked_rows"][:, None]
    for config, name in (
        (PerceptionKLConfig(estimator=Estimator.full), "masked_full_kl"),
        (PerceptionKLConfig(estimator=Estimator.full, detach=True), "masked_full_kl_detached"),
        (EntropyTermConfig(estimator=EntropyEstimator.full, view="masked"), "masked_full_entropy"),
    ):
        assert name in LOSS_TERMS[config.kind].requires(config)
        assert torch.equal(evaluate(config, {**cols, **exact}).values, torch.where(rows, exact[name], 0.0))
    own = EntropyTermConfig(estimator=EntropyEstimator.full)
    assert torch.equal(evaluate(own, exact).values, exact["full_entropy"])


def test_sft_imitates_correct_responses_alone():
    cols = columns()
    cols["accuracy"] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    values = evaluate(SFTTermConfig(coef=1.0), cols).values
    (gradient,) = torch.autograd.grad(values.sum(), cols["log_probs"])
    right = torch.tensor([True, False, True, False, False])[:, None].expand(B, T)
    torch.testing.assert_close(values[right], -cols["log_probs"][right])
    assert (values[~right] == 0).all() and (gradient == torch.where(right, -1.0, 0.0)).all()


def test_perception_kl_is_maximised():
    assert LOSS_TERMS["perception_kl"].sign == -1
    assert LOSS_TERMS["ref_kl"].sign == LOSS_TERMS["entropy"].sign == LOSS_TERMS["policy"].sign == 1


def test_perception_kl_is_zero_without_gradient_where_nothing_is_masked():
    cols = columns()
    cols["masked_log_probs"] = cols["log_probs"].detach().clone().requires_grad_()
    values = evaluate(PerceptionKLConfig(), cols).values
    assert (values == 0).all()
    for gradient in torch.autograd.grad(values.sum(), [cols["log_probs"], cols["masked_log_probs"]]):
        assert (gradient == 0).all()


def test_k3_of_policy_samples_estimates_the_kl():
    """Over samples from pi the code's ratio is unbiased for KL(pi || pi_mask); the paper's printed one is not."""
    pi = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    masked = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    kl = (pi * (pi / masked).log()).sum()
    cols = {
        "log_probs": pi.log()[None],
        "masked_log_probs": masked.log()[None],
        "masked_rows": torch.tensor([True]),
    }
    expectation = (pi * evaluate(PerceptionKLConfig(), cols).values[0]).sum()
    torch.testing.assert_close(expectation, kl, atol=1e-12, rtol=0)
    inverse = pi / masked
    assert (pi * (inverse - inverse.log() - 1)).sum().item() != pytest.approx(kl.item(), abs=1e-3)


def test_extreme_log_ratios_stay_finite():
    cols = columns()
    cols["log_probs"] = torch.full((B, T), -0.01, dtype=torch.float32, requires_grad=True)
    for name in ("old_log_probs", "ref_log_probs", "masked_log_probs"):
        cols[name] = torch.full((B, T), -400.0, dtype=torch.float32)
    for config in (PolicyTermConfig(), RefKLTermConfig(), PerceptionKLConfig()):
        values = evaluate(config, cols).values
        (gradient,) = torch.autograd.grad(values.sum(), cols["log_probs"])
        assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


def test_entropy_is_minus_log_prob_of_either_view():
    cols = columns()
    torch.testing.assert_close(evaluate(EntropyTermConfig(), cols).values, -cols["log_probs"])
    masked = evaluate(EntropyTermConfig(view="masked"), cols).values
    rows = cols["masked_rows"][:, None]
    torch.testing.assert_close(masked, torch.where(rows, -cols["masked_log_probs"], 0.0))
    (gradient,) = torch.autograd.grad(masked.sum(), cols["masked_log_probs"])
    torch.testing.assert_close(gradient, torch.where(rows, -1.0, 0.0).expand(B, T).double())


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.2), (None, 1.2), (0.5, None)])
def test_an_entropy_in_a_band_is_penalised_outside_alone(low, high):
    """On logits of five tokens, in float64, against autograd of the definition."""
    logits = (
        torch.randn(B, T, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    ).requires_grad_()
    probs = logits.softmax(-1)
    entropies = -(probs * probs.log()).sum(-1)
    config = EntropyTermConfig(estimator=EntropyEstimator.full, low=low, high=high)
    output = evaluate(config, {"full_entropy": entropies})
    expected = sum(
        (torch.relu(low - h) if low is not None else 0) + (torch.relu(h - high) if high is not None else 0)
        for h in entropies.flatten()
    )
    (found,) = torch.autograd.grad(output.values.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    torch.testing.assert_close(output.values.sum(), expected)
    torch.testing.assert_close(found, wanted)
    inside = (entropies >= (low or 0)) & (entropies <= (high or 9))
    assert inside.any() and not inside.all() and not found[inside].any()
    torch.testing.assert_close(output.metrics["full_entropy"], entropies)


@pytest.mark.parametrize(
    ("options", "says"), [({"low": 2.0, "high": 1.0}, "is above"), ({"high": 1.0, "estimator": "sampled"}, "=full")]
)
def test_a_band_that_cannot_be_is_refused(options, says):
    config = EntropyTermConfig(**{"estimator": EntropyEstimator.full, **options})
    with pytest.raises(ValueError, match=says):
        config.check("algorithm.terms.entropy")


def test_agreement_with_a_view_is_its_perception_kl_minimised():
    cols = columns()
    kl, agreement = PerceptionKLConfig(view="masked"), ViewKLConfig(view="masked")
    torch.testing.assert_close(evaluate(kl, cols).values, evaluate(agreement, cols).values)
    assert (LOSS_TERMS["perception_kl"].sign, LOSS_TERMS["view_kl"].sign) == (-1.0, 1.0)


def test_the_reward_for_depending_on_the_image_is_a_capped_mean_kl():
    cols = columns()
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 4:] = 0
    rows, config = cols["masked_rows"], ViewRewardConfig(coef=2.0, cap=0.5)
    found = view_reward(cols["old_log_probs"], cols["masked_log_probs"].detach(), rows, mask, config)
    capped = 0
    for b in range(B):
        apart = (cols["masked_log_probs"] - cols["old_log_probs"])[b].tolist()[: int(mask[b].sum())]
        mean = sum(math.exp(d) - d - 1 for d in apart) / len(apart)
        assert found[b].item() == pytest.approx(min(2.0 * mean, 0.5) if rows[b] else 0.0, abs=1e-12)
        capped += 2.0 * mean > 0.5
    assert 0 < capped
