"""The real vLLM with the tiny model of each family: the same log-probs as the trainer, before and after a sync."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.cluster import Cluster, read_prompts, requests, start_cluster
from tests.fakes.families import MODELS
from tests.fakes.runs import REWARD, records, start
from verl.data.collate import join_responses
from verl.models.forward import TOKENS

pytestmark = pytest.mark.vllm

# Model type, compute dtype, and how far engine and trainer may be apart, in the mean and at one token; vLLM's linear
# attention on a CPU computes in bfloat16 alone, and so does the trainer then. Both were 0.13 from float32 at a token.
NEWEST = {"qwen3_5": ("qwen3_5", "bfloat16", 0.02, 0.5), "internvl": ("internvl", "float32", 1e-4, 1e-3)}


# test_vllm.py has Qwen2.5-VL, and the runs below have the two newest.
@pytest.mark.parametrize("model_type", sorted(set(MODELS) - {"qwen2_5_vl", *NEWEST}))
def test_vllm_and_trainer_agree_before_and_after_a_sync(families, model_type, ray_cluster):
    """On prompts without, with one and with two images, where the model sees."""
    folder, options = families[model_type], ["worker.rollout.name=vllm"]
    if model_type == "qwen2":  # one of them with layers that vLLM has compiled, without processes for that
        compiler = "worker.rollout.engine_kwargs.compilation_config.inductor_compile_config"
        options += ["worker.rollout.enforce_eager=false", f"+{compiler}.compile_threads=1"]
    cluster = start_cluster(folder / "model", str(folder / "train.parquet"), *options)
    try:
        assert differences(cluster).max() < 1e-3
        cluster.train(folder)
        assert differences(cluster).max() > 0.05  # the trainer has moved, and the engine had not yet
        cluster.rollout.sync_weights(cluster.actor)
        assert differences(cluster).max() < 1e-3
    finally:
        cluster.stop()


def differences(cluster: Cluster) -> torch.Tensor:
    """Distance of engine and trainer in the log-prob of each token, [tokens]."""
    prompts = read_prompts(cluster)
    responses = cluster.generate(prompts, requests(4))
    found = cluster.log_probs(join_responses(prompts, responses, 3).select([*TOKENS, "mm_inputs"]))
    return (found - responses["rollout_log_probs"]).abs()[responses["response_mask"].bool()]


@pytest.mark.run
@pytest.mark.parametrize(("model_type", "dtype", "mean", "largest"), NEWEST.values(), ids=NEWEST)
def test_two_steps_of_papo_and_the_model_that_they_leave(
    families, model_type, dtype, mean, largest, tmp_path, ray_cluster
):
    engine = ["worker.rollout.name=vllm", f"worker.actor.fsdp.compute_dtype={dtype}"]
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        *("data.val_files=null", "trainer.val_before_train=false", "trainer.val_after_train=false"),
        *("data.min_pixels=784", "data.max_pixels=12544", "data.max_prompt_length=200"),
        f"worker.reward.reward_function={tmp_path / 'reward.py'}:score",
        *("worker.reward.reward_function_kwargs={}", "trainer.val_freq=0", "worker.actor.optim.lr=0.1", *engine),
    ]
    folder = families[model_type]
    done = start(folder, tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    found = records(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        assert line["actor/grad_norm"] > 0 and line["actor/perception_kl"] > 0 and line["actor/skipped_frac"] == 0
        # Before the first update, and behind the sync of others.
        assert line["rollout/log_prob_diff_mean"] < mean and line["rollout/log_prob_diff_max"] < largest
    # The folder that a run leaves, as vLLM reads it and as transformers does.
    cluster = start_cluster(tmp_path / "run" / "model", str(folder / "train.parquet"), *engine)
    try:
        found = differences(cluster)
        assert found.mean() < mean and found.max() < largest
    finally:
        cluster.stop()
