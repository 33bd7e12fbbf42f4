"""The real vLLM with the tiny model of each family: the same log-probs as the trainer, before and after a sync."""

from __future__ import annotations

import pytest

from tests.fakes.cluster import read_prompts, requests, start_cluster
from tests.fakes.families import MODELS
from verl.data.collate import join_responses
from verl.models.forward import TOKENS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("model_type", list(MODELS))
def test_vllm_and_trainer_agree_before_and_after_a_sync(families, model_type, ray_cluster):
    """On prompts without, with one and with two images, where the model sees."""
    folder = families[model_type]
    cluster = start_cluster(folder / "model", str(folder / "train.parquet"), "worker.rollout.name=vllm")
    prompts = read_prompts(cluster)

    def difference() -> float:
        responses = cluster.generate(prompts, requests(4))
        batch = join_responses(prompts, responses, 3).select([*TOKENS, "mm_inputs"])
        found = cluster.log_probs(batch)
        return (found - responses["rollout_log_probs"]).abs().max().item()

    try:
        assert difference() < 1e-3
        cluster.train(folder)
        assert difference() > 0.05  # the trainer has moved, and the engine had not yet
        cluster.rollout.sync_weights(cluster.actor)
        assert difference() < 1e-3
    finally:
        cluster.stop()
