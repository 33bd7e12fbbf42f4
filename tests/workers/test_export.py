"""Saving and syncing a policy whose head is tied to its embeddings, and one whose head is not."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText

from tests.fakes.actors import build_actor, log_probs, process_group, update, weights
from tests.fakes.rollouts import make_batch
from verl.config.worker import ModelConfig
from verl.data.vision import load_special_tokens
from verl.workers.fsdp.export import save_huggingface


def test_a_trained_policy_loads_in_plain_transformers_with_the_same_log_probs(assets, model, tmp_path):
    batch = make_batch(assets)
    with process_group():
        actor = build_actor(model, lr=0.1)
        start = log_probs(actor.policy, batch)
        update(actor, batch, 1)
        trained = log_probs(actor.policy, batch)
        save_huggingface(actor.policy, ModelConfig(str(model)), str(tmp_path / "saved"))
        sent = weights(actor)
    assert (trained - start).abs().max() > 0.01
    assert load_special_tokens(str(tmp_path / "saved")) == load_special_tokens(str(model))
    with process_group():
        again = build_actor(tmp_path / "saved")
        found = log_probs(again.policy, batch)
    torch.testing.assert_close(found, trained, atol=1e-6, rtol=0)

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
    assert set(plain) == set(sent)  # an engine gets the head too, tied or not
    for name, weight in plain.items():
        torch.testing.assert_close(sent[name], weight)
