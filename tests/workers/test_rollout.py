"""The Hugging Face engine: what it samples, that it says so truthfully, and how it takes weights."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from tests.fakes.actors import build_actor, log_probs, process_group, update, weights
from tests.fakes.rollouts import make_batch
from tests.fakes.rows import row, write_parquet
from verl.config.compose import compose_config
from verl.config.worker import RolloutConfig, SamplingOverride
from verl.data.collate import PromptCollator, join_responses
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor, load_special_tokens
from verl.models import onednn
from verl.models.families.base import SpecialTokens
from verl.workers.rollout.base import SamplingParams, train_sampling, validation_sampling
from verl.workers.rollout.hf_engine import HFEngine
from verl.workers.rollout.sampler import SeededSampler
from verl.workers.rollout.weight_sync import plan_buckets

PARAMS = SamplingParams(n=3, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12, seed=5)


@pytest.fixture(scope="module")
def setup(assets, tmp_path_factory):
    """(engine, prompts with no, one and two images, vision)"""
    path = write_parquet(
        tmp_path_factory.mktemp("rollout") / "a.parquet",
        [row(), row("How much is 1+1? Think.", images=0), row("<image>+<image>", images=2, width=84), row()],
    )
    overrides = [f"data.train_files={path}", "data.val_files=null", f"worker.actor.model.model_path={assets / 'model'}"]
    config = compose_config("quickstart", overrides)
    vision = VisionProcessor(str(assets / "model"), 784, 12544)
    data = PromptDataset(path, "k", replace(config.data, format_prompt=None), vision)
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(4)])
    engine = HFEngine(config, load_special_tokens(str(assets / "model")), torch.device("cpu"))
    return engine, prompts, vision


def requests(count=4, **changes):
    return [replace(PARAMS, seed=100 + i, **changes) for i in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_engine_and_trainer_agree(setup, assets, temperature):
    engine, prompts, _ = setup
    responses = engine.generate(prompts, requests(temperature=temperature))
    batch = join_responses(prompts, responses, 3)
    with process_group():
        actor = build_actor(assets / "model", temperature=temperature)
        trainer = log_probs(actor.policy, batch, "", 5)
    difference = (trainer - responses["rollout_log_probs"]).abs()
    assert responses["response_mask"].sum() > 30 and difference.max() < 1e-5


def test_a_response_ends_at_every_token_that_the_model_calls_an_end(assets, tmp_path):
    """Chat models list ends in generation_config.json that their tokenizer does not name."""
    shutil.copytree(assets / "model", tmp_path / "model")
    tokenizer = VisionProcessor(str(assets / "model"), 784, 12544).tokenizer
    other = tokenizer.convert_tokens_to_ids("7")
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, other]).save_pretrained(tmp_path / "model")
    special = load_special_tokens(str(tmp_path / "model"))
    assert special.eos == (tokenizer.eos_token_id, other)
    assert VisionProcessor(str(tmp_path / "model"), 784, 12544).special == special
    (tmp_path / "model/generation_config.json").unlink()
    assert load_special_tokens(str(tmp_path / "model")).eos == (tokenizer.eos_token_id,)


def load(engine, weights: dict, bucket_bytes: int = 10**9) -> int:
    """Send weights through the object store's carrier; returns the number of buckets."""
    layouts = plan_buckets(((n, w.dtype, tuple(w.shape)) for n, w in weights.items()), bucket_bytes)
    engine.receive_from("object_store", None, 0, 1, 2)
    engine.begin_weights()
    for layout in layouts:
        data = layout.empty(torch.device("cpu"))
        layout.pack((weights[entry.name] for entry in layout.entries), data)
        engine.load_bucket(layout, [data.numpy()])
    engine.finish_weights()
    return len(layouts)


def test_log_probs_agree_after_a_weight_sync_of_a_trained_policy(setup, assets):
    engine, prompts, _ = setup
    with process_group():
        actor = build_actor(assets / "model", lr=0.05)
        before = weights(actor)
        update(actor, make_batch(assets), 1)
        assert load(engine, weights(actor), bucket_bytes=200_000) > 3
        batch = join_responses(prompts, engine.generate(prompts, requests()), 3)
        trainer = log_probs(actor.policy, batch)
    assert (trainer - batch["rollout_log_probs"]).abs().max() < 1e-5
    load(engine, before)


@pytest.fixture(scope="module")
def packed(setup, assets):
    """An engine like setup's whose linear layers are packed, as those of larger models are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "LARGE", 0)
        config = compose_config("quickstart", [f"worker.actor.model.model_path={assets / 'model'}"])
        return HFEngine(config, setup[2].special, torch.device("cpu"))


@pytest.mark.skipif(not onednn.is_supported(), reason="only on x86")
def test_packed_layers_say_what_plain_ones_say_before_and_after_a_weight_sync(setup, packed, assets):
    engine, prompts, _ = setup
    own = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
    others = {name: weight * (1 + 0.3 * torch.rand_like(weight)) for name, weight in own.items()}
    said = []
    for sent in (own, others):
        load(engine, sent)
        load(packed, sent, bucket_bytes=200_000)
        plain, found = engine.generate(prompts, requests()), packed.generate(prompts, requests())
        assert torch.equal(plain["responses"], found["responses"])
        torch.testing.assert_close(plain["rollout_log_probs"], found["rollout_log_probs"], atol=1e-5, rtol=0)
        said.append(plain["rollout_log_probs"])
    assert said[0].shape != said[1].shape or not torch.equal(*said)
    load(engine, own)
    names = set(own) - packed.model.state_dict().keys()
    assert names == set(packed.packed) and len(names) > 20


@pytest.mark.skipif(not onednn.is_supported(), reason="only on x86")
def test_a_weight_of_a_packed_layer_that_is_missing_is_named(setup, packed):
    sent, name = dict(setup[0].model.state_dict()), sorted(packed.packed)[3]
    sent.pop(name)
    with pytest.raises(ValueError, match=f"left 1 weights as they were, such as '{name}'"):
        load(packed, sent)


def test_weights_that_are_missing_or_unknown_are_named(setup):
    engine, _, _ = setup
    own = {n: w.clone() for n, w in engine.model.state_dict().items()}
    with pytest.raises(ValueError, match="sent 'lm_hat.weight', which the engine's model does not have"):
        load(engine, {"lm_hat.weight": torch.zeros(1)})
    own.pop("lm_head.weight")
    with pytest.raises(ValueError, match="left 1 weights as they were, such as 'lm_head.weight'"):
        load(engine, own)


def test_image_tokens_that_do_not_fit_the_images_name_the_sample_and_its_sizes(setup):
    engine, prompts, vision = setup
    ids = prompts["prompt_ids"].clone()
    ids[2, -3] = vision.config.image_token_id
    wrong = prompts.with_columns({"prompt_ids": ids})
    with pytest.raises(
        ValueError, match=r"a.parquet:2: the prompt has 7 image tokens, .*84x28, 84x28 pixels take \[3, 3"
    ):
        engine.generate(wrong, requests())


def test_temperature_0_takes_the_likeliest_token(setup):
    engine, prompts, _ = setup
    greedy = engine.generate(prompts, requests(temperature=0.0))["responses"].view(4, 3, -1)
    assert (greedy == greedy[:, :1]).all() and not torch.equal(greedy[0], greedy[1])


def test_seeds_make_responses_repeatable_whatever_else_is_in_the_batch(setup):
    engine, prompts, _ = setup
    first, again = engine.generate(prompts, requests()), engine.generate(prompts, requests())
    assert torch.equal(first["responses"], again["responses"])
    other = engine.generate(prompts, [replace(r, seed=r.seed + 1000) for r in requests()])
    width = min(first["responses"].shape[1], other["responses"].shape[1])
    assert not torch.equal(first["responses"][:, :width], other["responses"][:, :width])
    alone = engine.generate(prompts.rows(torch.tensor([2])), [requests()[2]])
    width = alone["responses"].shape[1]
    assert torch.equal(alone["responses"], first["responses"][6:9, :width])


def test_requests_of_different_n_and_small_engine_batches_keep_their_order(setup):
    engine, prompts, _ = setup
    mixed = [replace(r, n=n) for r, n in zip(requests(), (2, 1, 3, 1), strict=True)]
    whole = engine.generate(prompts, mixed)
    assert len(whole) == 7
    engine.max_batch_size, size = 2, engine.max_batch_size
    try:
        assert torch.equal(engine.generate(prompts, mixed)["responses"], whole["responses"])
    finally:
        engine.max_batch_size = size
    three = engine.generate(prompts, requests())
    width = min(three["responses"].shape[1], whole["responses"].shape[1])
    assert torch.equal(whole["responses"][3:6, :width], three["responses"][6:9, :width])


def test_responses_end_with_the_end_token_and_hold_no_modality_token(setup):
    engine, prompts, vision = setup
    out = engine.generate(prompts, requests(n=40, max_tokens=30))
    lengths = out["response_mask"].sum(1)
    for ids, length in zip(out["responses"], lengths, strict=True):
        assert not set(ids[:length].tolist()) & set(vision.special.banned)
        assert vision.special.eos[0] not in ids[: length - 1].tolist()
        assert ids[length - 1] == vision.special.eos[0] or length == 30
        assert (ids[length:] == vision.special.pad).all()
    assert (lengths < 30).any()


def sample_many(sampling: SamplingParams, logits: torch.Tensor, banned=(3,)):
    sampler = SeededSampler([sampling], SpecialTokens(0, (1,), banned), torch.device("cpu"))
    return sampler(logits.expand(sampling.n, -1), torch.arange(sampling.n), 0)


def test_sampled_frequencies_are_the_tempered_distribution_without_banned_tokens():
    logits = torch.tensor([1.0, 0.0, -1.0, 5.0, 0.5])
    tokens, log_probs = sample_many(replace(PARAMS, n=20_000, temperature=0.8, max_tokens=1), logits)
    expected = torch.softmax((logits / 0.8).index_fill(0, torch.tensor([3]), float("-inf")), 0)
    counts = torch.bincount(tokens, minlength=5) / 20_000
    assert (counts - expected).abs().max() < 4 * 0.5 / 20_000**0.5 and counts[3] == 0
    torch.testing.assert_close(log_probs, expected.log()[tokens], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"), [(0.6, -1, {0, 4}), (1.0, 1, {0}), (0.01, -1, {0}), (0.95, 2, {0, 4})]
)
def test_truncated_sampling_keeps_the_nucleus_and_reports_its_own_log_probs(top_p, top_k, kept):
    logits = torch.tensor([1.0, 0.0, -1.0, 5.0, 0.5])
    tokens, log_probs = sample_many(replace(PARAMS, n=500, top_p=top_p, top_k=top_k, max_tokens=1), logits)
    assert set(tokens.tolist()) == kept
    inside = torch.full((5,), float("-inf"))
    inside[list(kept)] = logits[list(kept)]
    torch.testing.assert_close(log_probs, torch.log_softmax(inside, 0)[tokens], atol=1e-6, rtol=0)


def test_seeds_follow_from_prompt_and_epoch_and_validation_overrides_change_validation_alone():
    config = RolloutConfig(n=8, temperature=0.9, seed=1, val_override_config=SamplingOverride(n=4, temperature=0.5))
    first, second = (train_sampling(config, 9, ["a", "b"], epoch) for epoch in (0, 1))
    assert len({p.seed for p in first + second}) == 4
    assert first == train_sampling(config, 9, ["a", "b"], 0)
    validation = validation_sampling(config, 9, ["a"])[0]
    assert (validation.n, validation.temperature, validation.top_p) == (4, 0.5, 1.0)
    assert (first[0].n, first[0].temperature) == (8, 0.9)


def test_responses_that_have_ended_are_dropped_and_no_other_changes(setup, monkeypatch):
    engine, prompts, vision = setup
    many = [replace(r, n=n) for r, n in zip(requests(max_tokens=30), (9, 9, 9, 9), strict=True)]
    computed, drop = [], HFEngine._drop_done

    def watched(rows, done, cache):
        computed.append(drop(rows, done, cache))
        return computed[-1]

    monkeypatch.setattr(engine, "special", replace(engine.special, eos=tuple(range(100, 250))))  # one token in five
    monkeypatch.setattr(HFEngine, "_drop_done", staticmethod(watched))
    found = engine.generate(prompts, many)
    sizes = [rows.numel() for rows in computed]
    assert sizes[0] == 36 and len(set(sizes)) > 1 and sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(HFEngine, "_drop_done", staticmethod(lambda rows, done, cache: rows))
    kept = engine.generate(prompts, many)
    assert torch.equal(found["responses"], kept["responses"])
    torch.testing.assert_close(found["rollout_log_probs"], kept["rollout_log_probs"], atol=1e-5, rtol=0)


def test_each_prompt_is_computed_once_for_all_of_its_responses(setup):
    engine, prompts, _ = setup
    widths = []
    hook = engine.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        engine.generate(prompts, requests(max_tokens=2))
    finally:
        hook.remove()
    # The last prompt is the first once more.
    assert widths == [(1, int(prompts["prompt_mask"][:3].sum())), (12, 1)]
