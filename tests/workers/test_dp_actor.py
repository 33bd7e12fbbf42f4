"""update_policy: its gradient is that of the definition, however the batch is cut, ordered and shared."""

from __future__ import annotations

import functools
import logging
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from papo.terms import PerceptionKLConfig
from tests.fakes.actors import (
    MAX_RESPONSE_LENGTH,
    build_actor,
    gradient,
    log_probs,
    on_ranks,
    papo_terms,
    process_group,
    update,
    weights,
)
from tests.fakes.rollouts import make_batch
from tests.fakes.rows import row, write_parquet
from verl.algorithms.losses.entropy import EntropyEstimator, EntropyTermConfig
from verl.algorithms.losses.estimators import Estimator
from verl.algorithms.losses.policy import CISPOTermConfig, GSPOTermConfig, PolicyTermConfig
from verl.algorithms.losses.ref_kl import RefKLTermConfig
from verl.config.algorithm import LossAverage, OldLogProbs, ScheduleConfig, Truncation
from verl.metrics.machine import peak_flops
from verl.models.families.base import Family


@pytest.fixture(scope="module")
def model(assets):
    return assets / "model"


@pytest.fixture(scope="module")
def batch(assets):
    return make_batch(assets)


@pytest.fixture(scope="module")
def mixed(assets, tmp_path_factory):
    """Text-only, one-image and two-image prompts; the first half has no image at all."""
    rows = [row("1+1?", images=0), row("2+3?", images=0), row(), row("<image>+<image>", images=2)]
    return make_batch(assets, write_parquet(tmp_path_factory.mktemp("mixed") / "a.parquet", rows))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    with process_group():
        yield


def plain_log_probs(plain, batch, i, images, banned):
    """Log-probs of response `i` by a plain model, in its dtype, given the images of the column `images`."""
    keep = batch["attention_mask"][i].bool()
    ids = batch["input_ids"][i][keep]
    vision = batch[images][i].tensors()
    if vision:
        vision["mm_token_type_ids"] = (ids == plain.config.image_token_id).int()[None]
    logits = plain(input_ids=ids[None], **vision).logits[0, :-1].clone()
    logits[:, banned] = float("-inf")
    length = int(batch["response_mask"][i].sum())
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[-length:, 0]


def definition(model, batch, average=LossAverage.token, plain=None):
    """PAPO-G's objective written out on the plain model, row by row, in float64; returns its gradient."""
    plain = plain or AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float64)
    vocabulary = range(plain.config.text_config.vocab_size)
    banned = [v for v in vocabulary if v in banned_ids(model)]

    def log_probs(i, images):
        return plain_log_probs(plain, batch, i, images, banned)

    def k3(a, b):
        return (b - a).exp() - (b - a) - 1

    losses = []
    for i in range(len(batch)):
        length = int(batch["response_mask"][i].sum())
        old, ref, advantage = (batch[c][i, :length].double() for c in ("old_log_probs", "ref_log_probs", "advantages"))
        own = log_probs(i, "mm_inputs")
        ratio = (own - old).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        loss = torch.where(advantage < 0, torch.minimum(loss, -3 * advantage), loss)
        loss = loss + 0.3 * k3(own, ref) - 0.2 * own
        if batch["masked_rows"][i]:
            masked = log_probs(i, "masked_mm_inputs")
            loss = loss - 0.7 * k3(own, masked) - 0.4 * masked
        losses.append(loss)
    total = {
        LossAverage.token: torch.cat(losses).mean(),
        LossAverage.seq: torch.stack([x.mean() for x in losses]).mean(),
        LossAverage.seq_sum: torch.stack([x.sum() for x in losses]).mean() / MAX_RESPONSE_LENGTH,
    }[average]
    total.backward()
    zero = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    return {n: p.grad if p.grad is not None else zero[n] for n, p in plain.named_parameters()}, total.item()


@functools.cache
def banned_ids(model):
    from transformers import AutoTokenizer

    return frozenset(
        AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(
            [t for t in Family.modality_tokens if "audio" not in t]
        )
    )


def assert_same(found, expected, tolerance=2e-6):
    """Equal up to float32 rounding, measured against the largest entry of the whole gradient."""
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-3
    for name, value in expected.items():
        worst = (found[name].double() - value.double()).abs().max().item()
        assert worst < tolerance * scale, f"{name}: {worst / scale:.2e} of the largest entry"


@pytest.mark.parametrize("average", list(LossAverage))
def test_gradient_of_the_whole_objective_is_that_of_its_definition(model, batch, average):
    found, _ = gradient(model, batch, loss_avg_mode=average)
    expected, _ = definition(model, batch, average)
    assert_same(found, expected)


def whole_vocabulary(model, batch):
    """-0.7 KL(pi || pi_mask) + 0.2 H + 0.4 H_mask, exact, on the plain model in float64, with its gradient."""
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float64)
    allowed = [v for v in range(plain.config.text_config.vocab_size) if v not in banned_ids(model)]

    def distributions(i, images):
        keep = batch["attention_mask"][i].bool()
        ids, vision = batch["input_ids"][i][keep], batch[images][i].tensors()
        if vision:
            vision["mm_token_type_ids"] = (ids == plain.config.image_token_id).int()[None]
        logits = plain(input_ids=ids[None], **vision).logits[0, :-1][-int(batch["response_mask"][i].sum()) :]
        return torch.log_softmax(logits[:, allowed] / 0.8, -1)

    losses = []
    for i in range(len(batch)):
        own = distributions(i, "mm_inputs")
        loss = -0.2 * (own.exp() * own).sum(-1)
        if batch["masked_rows"][i]:
            masked = distributions(i, "masked_mm_inputs")
            loss = loss - 0.7 * (own.exp() * (own - masked)).sum(-1) - 0.4 * (masked.exp() * masked).sum(-1)
        losses.append(loss)
    torch.cat(losses).mean().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}


FULL = {
    "perception_kl": PerceptionKLConfig(coef=0.7, estimator=Estimator.full),
    "entropy": EntropyTermConfig(coef=0.2, estimator=EntropyEstimator.full),
    "masked_entropy": EntropyTermConfig(coef=0.4, estimator=EntropyEstimator.full, view="masked"),
}


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_micro_batch": 150, "logits_chunk_size": 4}])
def test_gradient_of_the_terms_over_the_whole_vocabulary(model, mixed, options):
    found, metrics = gradient(model, mixed, terms=FULL, temperature=0.8, **options)
    assert_same(found, whole_vocabulary(model, mixed), tolerance=1e-5)
    assert metrics["actor/perception_kl"] > 0 and metrics["actor/entropy"] > 1


def test_the_estimators_see_the_same_divergence(model, batch):
    """Between the first and last one only the noise of sampled tokens lies, and a detached branch changes no value."""
    values = {}
    for name, config in {
        "full": PerceptionKLConfig(coef=1.0, estimator=Estimator.full),
        "detached": PerceptionKLConfig(coef=1.0, estimator=Estimator.full, detach=True),
    }.items():
        moved, metrics = gradient(model, batch, terms={"kl": config})
        values[name] = metrics["actor/kl"], moved
    assert values["full"][0] == pytest.approx(values["detached"][0], rel=1e-6)
    name = next(n for n in values["full"][1] if "lm_head" in n)
    assert (values["full"][1][name] - values["detached"][1][name]).abs().max() > 1e-5


def without_old(batch, rollout=None):
    columns = [name for name in (*batch.tensors, *batch.objects) if name != "old_log_probs"]
    return batch.select(columns).with_columns({"rollout_log_probs": rollout} if rollout is not None else {})


def test_with_one_update_its_own_log_probs_are_the_old_ones_exactly(model, batch):
    terms = {"policy": PolicyTermConfig(), "ref_kl": RefKLTermConfig(coef=0.3)}
    actor = build_actor(model)
    old = log_probs(actor.policy, batch)
    expected, _ = gradient(model, batch.with_columns({"old_log_probs": old}), terms=terms)
    rollout = (old + 0.01) * batch["response_mask"]
    found, metrics = gradient(model, without_old(batch, rollout), terms=terms)
    assert_same(found, expected, tolerance=1e-5)
    # What the pass would have told of the engine is told by the update.
    assert metrics["rollout/log_prob_diff_max"] == pytest.approx(0.01, abs=1e-5)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(math.exp(-0.01) - 1 + 0.01, rel=1e-2)


def test_the_engines_log_probs_can_stand_for_the_old_ones(model, batch):
    terms = {"policy": PolicyTermConfig()}
    expected, _ = gradient(model, batch, terms=terms)
    engine = without_old(batch, batch["old_log_probs"])
    assert_same(gradient(model, engine, terms=terms, old_log_probs=OldLogProbs.rollout)[0], expected)


@pytest.mark.parametrize("average", list(LossAverage))
@pytest.mark.parametrize(
    "policy",
    [
        PolicyTermConfig(tis=Truncation.token),
        PolicyTermConfig(tis=Truncation.sequence),
        GSPOTermConfig(tis=Truncation.sequence),
        CISPOTermConfig(tis=Truncation.token, tis_cap=1.1),
    ],
    ids=lambda policy: f"{policy.kind}-{policy.tis}",
)
def test_every_policy_loss_makes_two_updates_however_the_batch_is_cut(model, batch, policy, average):
    noise = torch.randn(batch["old_log_probs"].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    drawn = batch.with_columns({"rollout_log_probs": batch["old_log_probs"] + noise})
    options = {"terms": {"policy": policy}, "mini_batches": 2, "loss_avg_mode": average, "lr": 0.1}
    whole, metrics = gradient(model, drawn, **options)
    cut, _ = gradient(model, drawn, max_tokens_per_micro_batch=1, **options)
    assert_same({n: g * 10 for n, g in cut.items()}, {n: g * 10 for n, g in whole.items()}, tolerance=1e-4)
    assert metrics["actor/skipped_frac"] == 0 and 0.5 < metrics["actor/tis_weight"] <= policy.tis_cap


@pytest.mark.parametrize("cap", [1.2, 100.0])
def test_responses_of_older_weights_get_truncated_importance_weights(model, batch, cap):
    """One step ahead (trainer.ahead): d/dw of -min(pi_w' / pi_older, cap) * pi_w / pi_w' * A at w' = w, in float64."""
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float64)
    older = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in older.parameters():
            weight += 0.02 * torch.randn_like(weight)
    banned = [v for v in range(plain.config.text_config.vocab_size) if v in banned_ids(model)]
    drawn, losses, weights = torch.zeros_like(batch["old_log_probs"]), [], []
    for i in range(len(batch)):
        with torch.no_grad():
            engine = plain_log_probs(older, batch, i, "mm_inputs", banned)
        own, length = plain_log_probs(plain, batch, i, "mm_inputs", banned), len(engine)
        drawn[i, :length] = engine.float()
        weights.append((own.detach() - engine).exp().clamp(max=cap))
        losses.append(-weights[-1] * (own - own.detach()).exp() * batch["advantages"][i, :length].double())
    torch.cat(losses).mean().backward()
    shown = torch.cat(weights)
    assert (shown < 0.9).any() and (shown > 1.1).any() and ((shown == cap).any() or cap == 100)
    terms = {"policy": PolicyTermConfig(tis=Truncation.token, tis_cap=cap)}
    found, metrics = gradient(model, without_old(batch, drawn), terms=terms)
    assert_same(found, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, tolerance=5e-6)
    assert metrics["actor/tis_weight"] == pytest.approx(shown.mean().item(), rel=1e-5)


def test_a_schedule_scales_its_term(model, batch):
    ramp = ScheduleConfig(warmup_steps=3)
    scheduled = {"policy": PolicyTermConfig(coef=2.0, schedule=ramp)}
    half, _ = gradient(model, batch, terms=scheduled, step=2, total_steps=9)
    whole, _ = gradient(model, batch, terms={"policy": PolicyTermConfig(coef=1.0)})
    assert_same(half, whole)


def test_a_scale_moves_maximised_terms_alone(model, batch):
    terms = {"policy": PolicyTermConfig(), "kl": PerceptionKLConfig(coef=0.8)}
    scaled, _ = gradient(model, batch, terms=terms, scale=0.25)
    smaller, _ = gradient(model, batch, terms={**terms, "kl": PerceptionKLConfig(coef=0.2)})
    assert_same(scaled, smaller)


def test_gradient_with_text_only_and_multi_image_rows(model, mixed):
    expected, _ = definition(model, mixed)
    assert_same(gradient(model, mixed)[0], expected)
    assert_same(gradient(model, mixed, max_tokens_per_micro_batch=1)[0], expected)


@pytest.mark.parametrize("average", list(LossAverage))
@pytest.mark.parametrize("budget", [1, 100, 200])
def test_the_token_budget_does_not_change_gradient_or_metrics(model, batch, average, budget):
    whole, metrics = gradient(model, batch, loss_avg_mode=average)
    cut, cut_metrics = gradient(model, batch, loss_avg_mode=average, max_tokens_per_micro_batch=budget)
    assert_same(cut, whole)
    for name in ("pg_loss", "perception_kl", "entropy", "masked_entropy", "ref_kl", "clip_frac_high", "grad_norm"):
        assert cut_metrics[f"actor/{name}"] == pytest.approx(metrics[f"actor/{name}"], rel=1e-5), name


@pytest.mark.parametrize("average", list(LossAverage))
def test_rows_that_were_not_graded_are_as_if_they_were_not_there(model, batch, average):
    """They come without response tokens, one of them in a micro-batch of its own."""
    kept = torch.ones(len(batch), dtype=torch.int64)
    kept[[0, 2]] = 0
    drawn = batch.with_columns({"rollout_log_probs": torch.randn(batch["old_log_probs"].shape)})
    left_out = without_old(drawn.with_columns({"response_mask": batch["response_mask"] * kept[:, None]}))
    options = {"loss_avg_mode": average, "max_tokens_per_micro_batch": 1}
    expected, smaller = gradient(model, without_old(drawn).rows(kept.bool()), **options)
    found, metrics = gradient(model, left_out, **options)
    assert_same(found, expected)
    assert {name: metrics[name] for name in smaller} == pytest.approx(smaller, rel=1e-5)


def test_order_of_rows_does_not_change_the_gradient(model, batch):
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    shuffled, _ = gradient(model, batch.rows(order), max_tokens_per_micro_batch=100)
    assert_same(shuffled, gradient(model, batch)[0])


@pytest.mark.parametrize("name", list(papo_terms()))
def test_each_term_alone_is_invariant_and_gives_a_gradient(model, batch, name):
    terms = {name: papo_terms()[name]}
    whole, _ = gradient(model, batch, terms=terms)
    cut, _ = gradient(model, batch, terms=terms, max_tokens_per_micro_batch=150)
    assert_same(cut, whole, tolerance=1e-5)


def test_gradient_checkpointing_and_small_logit_chunks_change_nothing(model, batch):
    found, _ = gradient(model, batch, enable_gradient_checkpointing=True, logits_chunk_size=4)
    assert_same(found, gradient(model, batch)[0])


def test_perception_kl_has_no_gradient_where_nothing_is_masked(assets, model):
    unmasked = make_batch(assets, prob=0.0)
    found, metrics = gradient(model, unmasked, terms={"kl": PerceptionKLConfig(coef=1.0)})
    assert metrics["actor/kl"] == pytest.approx(0.0, abs=1e-9)
    assert max(g.abs().max().item() for g in found.values()) < 1e-6


def test_masked_entropy_gives_a_gradient_only_through_a_live_view(model, batch):
    terms = {"policy": PolicyTermConfig(), "masked_entropy": EntropyTermConfig(coef=5.0, view="masked")}
    stored = batch.with_columns({"masked_log_probs": batch["old_log_probs"]})
    policy_alone, _ = gradient(model, stored, terms={"policy": PolicyTermConfig()}, live=False)
    inert, _ = gradient(model, stored, terms=terms, live=False)
    live, _ = gradient(model, stored, terms=terms)
    assert_same(inert, policy_alone)
    assert max((live[n] - policy_alone[n]).abs().max().item() for n in live) > 1e-2


def test_several_mini_batches_are_several_updates(model, batch):
    both, metrics = gradient(model, batch, mini_batches=2, lr=0.1)
    actor = build_actor(model, lr=0.1)
    before = weights(actor)
    for half in batch.chunk(2):
        update(actor, half, 1)
    after = weights(actor)
    assert_same(both, {n: before[n] - after[n] for n in before})


def test_a_frozen_vision_tower_stays(model, batch):
    moved, _ = gradient(model, batch, freeze_vision_tower=True)
    assert all((g == 0).all() for n, g in moved.items() if "visual" in n)
    assert any((g != 0).any() for n, g in moved.items() if "visual" not in n)


def test_log_probs_do_not_depend_on_the_micro_batch(model, mixed):
    actor = build_actor(model)
    for view in ("", "masked"):
        whole = log_probs(actor.policy, mixed, view)
        cut = log_probs(actor.policy, mixed, view, 1)
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
        assert (whole[mixed["response_mask"] == 0] == 0).all()


def test_a_gradient_that_is_not_finite_is_skipped_and_blamed_on_its_term(model, batch, caplog):
    broken = batch.with_columns({"ref_log_probs": torch.full_like(batch["ref_log_probs"], float("nan"))})
    actor = build_actor(model, max_skipped_updates=2)
    before = weights(actor)
    with caplog.at_level(logging.ERROR):
        metrics = update(actor, broken, 1).result()
    assert "SKIPPED" in caplog.text and "Loss terms at fault: ref_kl" in caplog.text
    assert metrics["actor/skipped_frac"] == 1 and metrics["actor/nonfinite/ref_kl"] == 1
    assert all(torch.equal(before[n], w) for n, w in weights(actor).items())
    update(actor, batch, 1)  # a healthy one in between starts the count anew
    update(actor, broken, 1)
    with pytest.raises(RuntimeError, match="2 updates in a row.*max_skipped_updates"):
        update(actor, broken, 1)


def _gradients_of_rank(rank, model, batches, options):
    """What one of two ranks computes, for several batches, from its half of the rows."""
    return [gradient(model, batch.chunk(2)[rank], **options) for batch in batches]


def test_two_ranks_give_the_gradient_of_one(model, batch, mixed):
    options = {"max_tokens_per_micro_batch": 150}
    ranks = on_ranks(2, _gradients_of_rank, model, [batch, mixed], options)
    for i, rows in enumerate((batch, mixed)):  # in `mixed` one rank has no image at all
        whole, _ = gradient(model, rows)
        for rank in ranks:
            assert_same(rank[i][0], whole)


def test_bfloat16_compute_with_float32_weights_is_close_to_float32(model, batch):
    exact, rounded = build_actor(model), build_actor(model, compute_dtype="bfloat16")
    reference = log_probs(exact.policy, batch, "masked")
    found = log_probs(rounded.policy, batch, "masked")
    assert found.dtype == torch.float32 and 0 < (found - reference).abs().max() < 0.05
    metrics = update(rounded, batch, 1).result()
    assert metrics["actor/skipped_frac"] == 0
    assert {w.dtype for w in weights(rounded).values()} == {torch.float32}


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_of_an_update_are_those_that_torch_counts(model, batch, frozen):
    """But for what is left out or taken whole, and is little in real models: torch counts attention, the tower's merger
    once for four patches, and not the last token of a response, here one of five."""
    actor = build_actor(model, terms={"policy": PolicyTermConfig()}, freeze_vision_tower=frozen)
    with FlopCounterMode(display=False) as counter:
        update(actor, batch)
    assert 1 < actor.operations(batch) / counter.get_total_flops() < 1.25
    assert peak_flops("NVIDIA H100 80GB HBM3", None) == 989e12 and peak_flops("CPU", None) is None
