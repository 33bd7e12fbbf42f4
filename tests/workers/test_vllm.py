"""The real vLLM, in real workers: what it samples, that it says so truthfully, and that a sync reaches all of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tests.fakes.cluster import MIXED, kill_one_while_it_generates, read_prompts, requests, start_cluster
from tests.fakes.rows import row, write_parquet
from verl.config.compose import compose_config
from verl.data.collate import join_responses
from verl.models.forward import TOKENS
from verl.workers.rollout.vllm_engine import engine_arguments

pytestmark = pytest.mark.vllm
# For what has nothing to do with the weight that head and embedding may share.
UNTIED = pytest.mark.parametrize("model", ["untied"], indirect=True)


@pytest.fixture(scope="module")
def cluster(model, ray_cluster, tmp_path_factory):
    """Two replicas and a trainer, on prompts with no, one and two images; first with an untied head, then tied."""
    path = write_parquet(tmp_path_factory.mktemp("vllm") / "a.parquet", MIXED)
    cluster = start_cluster(model, path, "worker.rollout.name=vllm", "worker.rollout.data_parallel_size=2")
    yield cluster
    cluster.stop()


@pytest.fixture
def wide_model(assets, tmp_path):
    """The untrained model with heads that two devices can share."""
    config = AutoConfig.from_pretrained(assets / "model")
    for part in (config.text_config, config.vision_config):
        part.hidden_size = 128
    config.vision_config.num_heads = config.text_config.num_attention_heads = 4
    config.vision_config.out_hidden_size, config.text_config.num_key_value_heads = 128, 2
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "wide")
    AutoProcessor.from_pretrained(assets / "model").save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def difference(cluster, prompts, responses, n: int) -> torch.Tensor:
    """|log-prob of the engine - log-prob of the trainer| [B, R], at temperature 1."""
    batch = join_responses(prompts, responses, n).select([*TOKENS, "mm_inputs"])
    trainer = cluster.log_probs(batch)
    return (trainer - responses["rollout_log_probs"]).abs()


def test_engine_and_trainer_agree_before_and_after_syncs_of_trained_weights(cluster, assets):
    """On images that the engine has encoded before: everything made with the old weights has to be forgotten."""
    prompts = read_prompts(cluster)
    before, start = cluster.weights(), cluster.generate(prompts, requests(4))
    assert difference(cluster, prompts, start, 3).max() < 1e-4
    for _ in range(2):
        cluster.train(assets)
        stale = difference(cluster, prompts, cluster.generate(prompts, requests(4)), 3)
        cluster.rollout.sync_weights(cluster.actor)
        fresh = cluster.generate(prompts, requests(4))
        assert stale.max() > 0.05  # the trainer has moved, and the engine had not yet
        assert difference(cluster, prompts, fresh, 3).max() < 1e-4
    assert (fresh["weight_version"] == 2).all() and (start["weight_version"] == 0).all()
    after = cluster.weights()
    assert all((after[name] != before[name]).any() for name in before)  # every single weight has moved


@pytest.mark.parametrize("carrier", ["ipc", "collective"])
def test_the_other_carriers_reach_vllms_workers(cluster, assets, carrier):
    prompts = read_prompts(cluster)
    cluster.train(assets, updates=1)
    cluster.rollout.carrier = carrier
    cluster.rollout.sync_weights(cluster.actor)
    cluster.rollout.carrier = "object_store"
    assert difference(cluster, prompts, cluster.generate(prompts, requests(4)), 3).max() < 1e-4


@UNTIED
def test_seeds_make_responses_repeatable_and_the_samples_of_a_prompt_differ(cluster):
    prompts, sampling = read_prompts(cluster), requests(4)
    first, again = cluster.generate(prompts, sampling), cluster.generate(prompts, sampling)
    assert torch.equal(first["responses"], again["responses"])
    assert len({tuple(ids.tolist()) for ids in first["responses"]}) == 12
    other = cluster.generate(prompts, [replace(r, seed=r.seed + 1000) for r in sampling])
    assert not torch.equal(first["responses"], other["responses"])


@UNTIED
def test_responses_end_with_the_end_token_and_hold_no_modality_token(cluster):
    special = cluster.vision.special
    out = cluster.generate(read_prompts(cluster), requests(4, n=30, max_tokens=40))
    lengths = out["response_mask"].sum(1)
    for ids, length in zip(out["responses"], lengths, strict=True):
        assert not set(ids[:length].tolist()) & set(special.banned)
        assert special.eos[0] not in ids[: length - 1].tolist()
        assert ids[length - 1] == special.eos[0] or length == 40
        assert (ids[length:] == special.pad).all()
    assert (lengths < 40).any() and (out["rollout_log_probs"][out["response_mask"] == 0] == 0).all()


def first_tokens(cluster, prompts, **changes) -> list[dict[int, float]]:
    """For each prompt the log-prob of every first token that 60 samples show."""
    out = cluster.generate(prompts, requests(len(prompts), max_tokens=1, n=60, **changes))
    pairs = list(zip(out["responses"][:, 0].tolist(), out["rollout_log_probs"][:, 0].tolist(), strict=True))
    return [dict(pairs[60 * index : 60 * index + 60]) for index in range(len(prompts))]


@UNTIED
def test_log_probs_are_those_of_the_distribution_that_was_sampled(cluster):
    prompts = read_prompts(cluster)
    plain, cold = first_tokens(cluster, prompts), first_tokens(cluster, prompts, temperature=0.5)
    for warm, cool, two in zip(plain, cold, first_tokens(cluster, prompts, top_k=2), strict=True):
        assert len(two) == 2 and sum(math.exp(p) for p in two.values()) == pytest.approx(1, abs=1e-5)
        shared = sorted(warm.keys() & cool.keys(), key=warm.get)
        assert len(shared) > 1
        low, high = shared[0], shared[-1]  # at half the temperature, differences of log-probs double
        assert cool[high] - cool[low] == pytest.approx(2 * (warm[high] - warm[low]), abs=1e-4)


@UNTIED
def test_prompts_that_cannot_be_are_refused_by_name(cluster):
    prompts = read_prompts(cluster)
    ids = prompts["prompt_ids"].clone()
    ids[2, -3] = cluster.vision.config.image_token_id
    with pytest.raises(
        ValueError, match=r"a.parquet:2: the prompt has 7 image tokens, .*84x28, 84x28 pixels take \[3, 3"
    ):
        cluster.generate(prompts.with_columns({"prompt_ids": ids}), requests(4))


@UNTIED
def test_a_replica_that_is_killed_comes_back_with_the_weights_and_nothing_is_lost(cluster, assets):
    prompts, sampling = read_prompts(cluster), requests(4, n=16, max_tokens=200)
    cluster.train(assets, updates=1)
    cluster.rollout.sync_weights(cluster.actor)
    expected = cluster.generate(prompts, sampling)
    found = kill_one_while_it_generates(cluster, prompts, sampling)
    assert len(found) == 64
    for name in ("responses", "response_mask", "weight_version"):
        assert torch.equal(found[name], expected[name])
    assert difference(cluster, prompts, found, 16).max() < 1e-4


def test_an_engine_over_two_devices_takes_weights_through_every_carrier(assets, wide_model, ray_cluster, tmp_path):
    """Its workers are processes of vLLM's own, which Ray does not know."""
    path = write_parquet(tmp_path / "a.parquet", [row(), row("How much is 1+1? Think.", images=0)])
    cluster = start_cluster(wide_model, path, "worker.rollout.name=vllm", "worker.rollout.tensor_parallel_size=2")
    prompts = read_prompts(cluster)
    for carrier in ("object_store", "ipc", "collective"):
        cluster.train(assets, updates=1)
        assert difference(cluster, prompts, cluster.generate(prompts, requests(2)), 3).max() > 1e-3
        cluster.rollout.carrier = carrier
        cluster.rollout.sync_weights(cluster.actor)
        assert difference(cluster, prompts, cluster.generate(prompts, requests(2)), 3).max() < 1e-4
    cluster.stop()


def test_options_reach_the_engine_under_the_names_that_users_know(assets):
    def arguments(device: str, *overrides: str) -> dict:
        base = ["data.val_files=b", "worker.actor.model.model_path=m"]
        return engine_arguments(compose_config("grpo", [*base, *overrides]), torch.device(device))

    cpu, gpu = arguments("cpu"), arguments("cuda", "worker.rollout.gpu_memory_utilization=0.5")
    assert (cpu["dtype"], cpu["enforce_eager"], cpu["enable_chunked_prefill"]) == ("float32", True, False)
    assert (gpu["dtype"], gpu["enforce_eager"], gpu["enable_chunked_prefill"]) == ("bfloat16", False, True)
    assert not arguments("cpu", "worker.rollout.enforce_eager=false")["enforce_eager"]
    assert gpu["gpu_memory_utilization"] == 0.5 and gpu["enable_sleep_mode"] and "enable_sleep_mode" not in cpu
    assert gpu["max_model_len"] == 4096 + 2048 and gpu["max_num_batched_tokens"] == 8192
    assert not arguments("cuda", "worker.rollout.dedicated_gpus=2")["enable_sleep_mode"]
    changed = arguments(
        "cuda",
        "worker.rollout.tensor_parallel_size=2",
        "worker.rollout.limit_images=3",
        "worker.rollout.max_num_batched_tokens=16384",
        "worker.rollout.max_model_len=8192",
        "worker.rollout.enforce_eager=true",
        "worker.rollout.enable_chunked_prefill=false",
        "+worker.rollout.engine_kwargs.swap_space=2",
    )
    assert (changed["tensor_parallel_size"], changed["distributed_executor_backend"]) == (2, "mp")
    assert changed["limit_mm_per_prompt"] == {"video": 0, "image": 3} and changed["swap_space"] == 2
    assert (changed["max_num_batched_tokens"], changed["max_model_len"]) == (16384, 8192)
    assert changed["enforce_eager"] and not changed["enable_chunked_prefill"]
