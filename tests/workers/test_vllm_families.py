"""The real vLLM with the tiny model of each family: the same log-probs as the trainer, before and after a sync."""

from __future__ import annotations

import pytest

from tests.fakes.cluster import read_prompts, requests, start_cluster
from tests.fakes.families import MODELS
from tests.fakes.runs import REWARD, records, start
from verl.data.collate import join_responses
from verl.models.forward import TOKENS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("model_type", list(MODELS))
def test_vllm_and_trainer_agree_before_and_after_a_sync(families, model_type, ray_cluster):
    """On prompts without, with one and with two images, where the model sees."""
    folder = families[model_type]
    # vLLM's linear attention on a CPU computes in bfloat16 alone, and so does the trainer then.
    dtype, close = ("bfloat16", 0.15) if model_type == "qwen3_5" else ("float32", 1e-3)
    overrides = ["worker.rollout.name=vllm", f"worker.actor.fsdp.compute_dtype={dtype}"]
    cluster = start_cluster(folder / "model", str(folder / "train.parquet"), *overrides)
    prompts = read_prompts(cluster)

    def difference() -> float:
        responses = cluster.generate(prompts, requests(4))
        batch = join_responses(prompts, responses, 3).select([*TOKENS, "mm_inputs"])
        found = cluster.log_probs(batch)
        return (found - responses["rollout_log_probs"]).abs().max().item()

    try:
        assert difference() < close
        cluster.train(folder)
        assert difference() > 2 * close  # the trainer has moved, and the engine had not yet
        cluster.rollout.sync_weights(cluster.actor)
        assert difference() < close
    finally:
        cluster.stop()


@pytest.mark.run
@pytest.mark.parametrize("model_type", ["qwen3_5", "internvl"])
def test_two_steps_of_papo_through_ray(families, model_type, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        *("data.val_files=null", "trainer.val_before_train=false", "trainer.val_after_train=false"),
        *("data.min_pixels=784", "data.max_pixels=12544", "data.max_prompt_length=200"),
        f"worker.reward.reward_function={tmp_path / 'reward.py'}:score",
        *("worker.reward.reward_function_kwargs={}", "worker.rollout.name=vllm", "trainer.val_freq=0"),
        f"worker.actor.fsdp.compute_dtype={'bfloat16' if model_type == 'qwen3_5' else 'float32'}",
    ]
    done = start(families[model_type], tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    found = records(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        assert line["actor/grad_norm"] > 0 and line["actor/perception_kl"] > 0 and line["actor/skipped_frac"] == 0
