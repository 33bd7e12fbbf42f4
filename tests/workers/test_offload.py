"""Weights, gradients and optimizer states in main memory, and in bfloat16: the whole worker, on two ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

from tests.fakes.actors import on_ranks
from tests.fakes.rollouts import make_batch
from verl.algorithms.losses.compose import coefficients
from verl.checkpoint.tensors import read_tensors, saved_tensors
from verl.columns import ORIGINAL
from verl.config.compose import compose_config
from verl.protocol import DataProto
from verl.workers.fsdp.checkpoint import StateWriter
from verl.workers.model_worker import ActorWorker, CriticWorker, ReferenceWorker

OFFLOAD = [f"worker.{role}.fsdp.offload=always" for role in ("actor", "ref", "critic")]
PARKED = [f"worker.{role}.fsdp.offload=between_phases" for role in ("actor", "ref", "critic")]
HYBRID = ["worker.actor.fsdp.shard_size=1"]  # each rank has a copy of the weights
BF16 = [f"worker.{role}.optim.strategy=adamw_bf16" for role in ("actor", "critic")]


def train(rank: int, assets: Path, out: Path, *variants: list[str]) -> list[dict[str, object]]:
    """Two steps of an actor's rank in each variant, saved to out/0, out/1, ...: what an engine would get, metrics,
    dtypes."""
    return [_train(rank, assets, str(out / str(i)), variant) for i, variant in enumerate(variants)]


def _train(rank: int, assets: Path, out: str, overrides: list[str]) -> dict[str, object]:
    config = compose_config(
        "papo_grpo_live",
        [
            f"worker.actor.model.model_path={assets / 'model'}",
            "worker.actor.optim.lr=0.001",
            "worker.rollout.sync_bucket_mb=1",
            "data.max_response_length=10",
            *overrides,
        ],
    )
    worker = ActorWorker("actor", config, rank, 2, "cpu", 1)
    worker.build(total_updates=2)
    rows = make_batch(assets).chunk(2)[rank]
    coefs = coefficients(worker.actor.terms, 1, 2)
    worker.take_rows(rows, [len(rows)])
    metrics = [worker.update_policy(DataProto(rows.tensors), coefs).result() for _ in range(2)]
    worker.send_through("object_store")
    sent = {}
    for layout in worker.plan_weights():
        data = worker.send_bucket(layout, rank == 0)
        if rank == 0:
            sent |= {name: weight.clone() for name, weight in layout.unpack(torch.from_numpy(data.copy()))}
    worker.end_sending()
    checkpoint = save(worker, rank, f"{out}_checkpoint")
    on_device = sum(map(size_on_device, (*worker.weights(), *worker.states())))
    worker.save_huggingface(out)
    return {
        "sent": sent,
        "checkpoint": checkpoint,
        "on_device": on_device,
        "norms": [step["actor/grad_norm"] for step in metrics],
        "log_probs": worker.compute_log_probs([ORIGINAL])["log_probs"],
        "dtypes": {p.dtype for p in worker.policy.parameters()},
    }


def save(worker: ActorWorker, rank: int, folder: str) -> dict[str, torch.Tensor]:
    """Save a checkpoint in the background and read it whole."""
    if rank == 0:
        os.mkdir(folder)
    dist.barrier()
    worker.writer = StateWriter()  # as `join` makes it
    worker.start_save(folder, optimizer=True, background=True)
    files = worker.finish_save()
    assert isinstance(files, dict), files
    dist.barrier()
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in saved_tensors(folder).items()}
    read_tensors(folder, tensors, alone=True)
    return tensors


def size_on_device(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().nbytes()


def read(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def test_offloaded_updates_are_bit_for_bit_those_without_and_bfloat16_takes_the_same_steps(assets, tmp_path):
    plain, offloaded, narrow = on_ranks(2, train, assets, tmp_path, [], OFFLOAD, [*BF16, *OFFLOAD])[0]
    assert offloaded["norms"] == plain["norms"] and torch.equal(offloaded["log_probs"], plain["log_probs"])
    assert offloaded["sent"].keys() == plain["sent"].keys() and len(plain["sent"]) > 20
    before, saved, saved_narrow = read(assets / "model"), read(tmp_path / "1"), read(tmp_path / "2")
    moved = missed = 0.0
    for name, weight in plain["sent"].items():
        assert torch.equal(offloaded["sent"][name], weight) and torch.equal(saved[name], weight), name
        assert saved_narrow[name].dtype == torch.bfloat16
        assert torch.equal(saved_narrow[name].float(), narrow["sent"][name]), name
        moved += (weight - before[name]).abs().sum().item()
        missed += (narrow["sent"][name] - weight).abs().sum().item()
    assert missed < 0.25 * moved
    assert plain["dtypes"] == {torch.float32} and narrow["dtypes"] == {torch.bfloat16}
    assert narrow["norms"] == pytest.approx(plain["norms"], rel=0.05)


def test_parked_between_phases_nothing_changes_and_nothing_stays_on_the_device(assets, tmp_path):
    plain, parked, hybrid = on_ranks(2, train, assets, tmp_path, [], PARKED, HYBRID)[0]
    assert plain["on_device"] > 0 and parked["on_device"] == 0
    assert parked["norms"] == plain["norms"] and torch.equal(parked["log_probs"], plain["log_probs"])
    saved = read(tmp_path / "1")
    assert parked["checkpoint"].keys() == plain["checkpoint"].keys() and len(plain["checkpoint"]) > 60
    assert all(torch.equal(parked["checkpoint"][name], value) for name, value in plain["checkpoint"].items())
    assert all(torch.equal(parked["sent"][name], weight) for name, weight in plain["sent"].items())
    assert all(torch.equal(saved[name], weight) for name, weight in plain["sent"].items())
    assert hybrid["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    torch.testing.assert_close(hybrid["log_probs"], plain["log_probs"], atol=1e-4, rtol=0)
    assert hybrid["checkpoint"].keys() == plain["checkpoint"].keys()
    for name, value in plain["checkpoint"].items():  # each weight once, whichever of its copies wrote it
        torch.testing.assert_close(hybrid["checkpoint"][name], value, atol=2e-3, rtol=0)


def others(rank: int, assets: Path, *variants: list[str]) -> list[tuple[torch.Tensor, torch.Tensor, set[torch.dtype]]]:
    """In each variant (log-probs of the reference, values after two updates of the critic, the reference's dtypes)."""
    return [_others(rank, assets, variant) for variant in variants]


def _others(rank: int, assets: Path, overrides: list[str]) -> tuple[torch.Tensor, torch.Tensor, set[torch.dtype]]:
    config = compose_config(
        "grpo", [f"worker.actor.model.model_path={assets / 'model'}", "worker.critic.optim.lr=0.01", *overrides]
    )
    reference, critic = (kind(kind.__name__, config, rank, 2, "cpu", 1) for kind in (ReferenceWorker, CriticWorker))
    reference.build()
    critic.build(total_updates=2)
    rows = make_batch(assets).chunk(2)[rank]
    rows = rows.with_columns({"values": torch.zeros_like(rows["advantages"]), "returns": rows["advantages"]})
    for worker in (reference, critic):
        worker.take_rows(rows, [len(rows)])
    for _ in range(2):
        critic.update_critic(DataProto(rows.tensors))
    log_probs = reference.compute_log_probs([ORIGINAL])["log_probs"]
    return log_probs, critic.compute_values()["values"], {p.dtype for p in reference.policy.parameters()}


def test_reference_and_critic_are_offloaded_and_narrowed_too(assets):
    narrowed = [*BF16, "worker.ref.fsdp.compute_dtype=bfloat16"]
    plain, offloaded, narrow, parked = on_ranks(2, others, assets, [], OFFLOAD, narrowed, PARKED)[0]
    assert torch.equal(parked[0], plain[0]) and torch.equal(parked[1], plain[1])
    (log_probs, values, dtypes), valid = plain, plain[1] != 0
    assert torch.equal(offloaded[0], log_probs) and torch.equal(offloaded[1], values) and values.abs().max() > 0.01
    assert dtypes == {torch.float32}  # as its forward computes here
    assert narrow[2] == {torch.bfloat16} and (narrow[0] - log_probs).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([narrow[1][valid], values[valid]]))[0, 1] > 0.9
