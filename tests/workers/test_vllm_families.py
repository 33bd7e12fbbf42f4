"""The real vLLM with the tiny model of each family: the same log-probs as the trainer, before and after a sync."""

from __future__ import annotations

import pytest

from tests.fakes.cluster import Cluster, read_prompts, requests, start_cluster
from tests.fakes.families import MODELS
from tests.fakes.runs import REWARD, records, start
from verl.data.collate import join_responses
from verl.models.forward import TOKENS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("model_type", list(MODELS))
def test_vllm_and_trainer_agree_before_and_after_a_sync(families, model_type, ray_cluster):
    """On prompts without, with one and with two images, where the model sees."""
    folder = families[model_type]
    cluster = start_cluster(folder / "model", str(folder / "train.parquet"), *engine_of(model_type))
    close = CLOSE[model_type == "qwen3_5"]
    try:
        assert difference(cluster) < close
        cluster.train(folder)
        assert difference(cluster) > 2 * close  # the trainer has moved, and the engine had not yet
        cluster.rollout.sync_weights(cluster.actor)
        assert difference(cluster) < close
    finally:
        cluster.stop()


CLOSE = 1e-3, 0.15  # in float32 and in bfloat16


def engine_of(model_type: str) -> list[str]:
    """vLLM's linear attention on a CPU computes in bfloat16 alone, and so does the trainer then."""
    dtype = "bfloat16" if model_type == "qwen3_5" else "float32"
    return ["worker.rollout.name=vllm", f"worker.actor.fsdp.compute_dtype={dtype}"]


def difference(cluster: Cluster) -> float:
    """The largest between engine and trainer, of any token's log-prob."""
    prompts = read_prompts(cluster)
    responses = cluster.generate(prompts, requests(4))
    found = cluster.log_probs(join_responses(prompts, responses, 3).select([*TOKENS, "mm_inputs"]))
    return (found - responses["rollout_log_probs"]).abs().max().item()


@pytest.mark.run
@pytest.mark.parametrize("model_type", ["qwen3_5", "internvl"])
def test_two_steps_of_papo_and_the_model_that_they_leave(families, model_type, tmp_path, ray_cluster):
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        *("data.val_files=null", "trainer.val_before_train=false", "trainer.val_after_train=false"),
        *("data.min_pixels=784", "data.max_pixels=12544", "data.max_prompt_length=200"),
        f"worker.reward.reward_function={tmp_path / 'reward.py'}:score",
        *("worker.reward.reward_function_kwargs={}", "trainer.val_freq=0", *engine_of(model_type)),
    ]
    folder = families[model_type]
    done = start(folder, tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    found = records(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        assert line["actor/grad_norm"] > 0 and line["actor/perception_kl"] > 0 and line["actor/skipped_frac"] == 0
    # The folder that a run leaves, as vLLM reads it and as transformers does.
    cluster = start_cluster(tmp_path / "run" / "model", str(folder / "train.parquet"), *engine_of(model_type))
    try:
        assert difference(cluster) < CLOSE[model_type == "qwen3_5"]
    finally:
        cluster.stop()
