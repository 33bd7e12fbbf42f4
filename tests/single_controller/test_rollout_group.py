"""Several engines as one: shares, order, weight syncs through every carrier, and engines that die."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import ray
import torch
import torch.distributed as dist

from tests.fakes.cluster import kill_one_while_it_generates, read_prompts, requests, start_cluster
from tests.fakes.rows import row, write_parquet
from verl.data.collate import join_responses
from verl.models.forward import TOKENS
from verl.single_controller.resources import Seat
from verl.single_controller.rollout_group import Receivers, spread
from verl.workers.rollout import weight_sync

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def cluster(assets, ray_cluster, tmp_path_factory):
    rows = [
        row(),
        row("How much is 1+1? Think.", images=0),
        row("<image>+<image>", images=2, width=84),
        row("<image>?"),
    ]
    path = write_parquet(tmp_path_factory.mktemp("group") / "a.parquet", rows)
    cluster = start_cluster(assets / "model", path, "worker.rollout.name=hf", "worker.rollout.data_parallel_size=2")
    yield cluster
    cluster.stop()


def generate(cluster, prompts, sampling):
    return cluster.rollout.result(cluster.rollout.generate(prompts, sampling))


def test_shares_are_equal_in_tokens_and_hold_every_row_once():
    lengths = [900, 10, 10, 10, 500, 20, 400, 10]
    shares = spread(lengths, requests(8), 3)
    assert sorted(row for share in shares for row in share) == list(range(8))
    loads = [sum(lengths[row] + 36 for row in share) for share in shares]
    assert max(loads) == 936 and all(share == sorted(share) for share in shares)
    assert spread([5], requests(1), 3) == [[0], [], []]


def test_two_replicas_give_what_one_gives_in_the_order_of_the_prompts(cluster):
    prompts, sampling = read_prompts(cluster), requests(4)
    together = generate(cluster, prompts, sampling)
    for index in range(4):
        alone = generate(cluster, prompts.rows(torch.tensor([index])), [sampling[index]])
        width = alone["responses"].shape[1]
        assert torch.equal(together["responses"][3 * index : 3 * index + 3, :width], alone["responses"])
    assert len(together) == 12


@pytest.mark.parametrize("carrier", ["object_store", "ipc", "collective"])
def test_after_a_sync_every_replica_has_the_trained_weights(cluster, assets, carrier):
    prompts, sampling = read_prompts(cluster), requests(4)
    before = cluster.weights()
    cluster.rollout.carrier = carrier
    version = cluster.rollout.version
    old = generate(cluster, prompts, sampling)
    cluster.train(assets)
    cluster.rollout.sync_weights(cluster.actor)
    after = cluster.weights()
    assert all((after[name] != before[name]).any() for name in before)  # every single weight has moved
    new = generate(cluster, prompts, sampling)
    assert (new["weight_version"] == version + 1).all() and (old["weight_version"] == version).all()
    batch = join_responses(prompts, new, 3)
    trainer = cluster.log_probs(batch.select([*TOKENS, "mm_inputs"]))
    assert (trainer - new["rollout_log_probs"]).abs().max() < 1e-4
    width = min(old["responses"].shape[1], new["responses"].shape[1])
    assert not torch.equal(old["responses"][:, :width], new["responses"][:, :width])


def test_a_replica_that_is_killed_comes_back_with_the_weights_and_nothing_is_lost(cluster, assets, caplog):
    prompts, sampling = read_prompts(cluster), requests(4, n=4, max_tokens=200)
    cluster.train(assets, updates=1)
    cluster.rollout.sync_weights(cluster.actor)
    expected = generate(cluster, prompts, sampling)
    with caplog.at_level("WARNING", logger="verl"):
        found = kill_one_while_it_generates(cluster, prompts, sampling)
    for name in ("responses", "response_mask", "weight_version"):
        assert torch.equal(found[name], expected[name])
    assert "rollout replica 1 failed while generating and is started again (failure 1 of 3)" in caplog.text
    assert cluster.rollout.failures == 0


def test_ahead_of_an_update_another_replica_takes_the_share_of_one_that_is_killed(cluster, assets, caplog):
    """The trainer's weights may have changed already; the other engine has those that the responses belong to."""
    prompts, sampling = read_prompts(cluster), requests(4, n=4, max_tokens=200)
    expected = generate(cluster, prompts, sampling)
    cluster.train(assets, updates=1)
    with caplog.at_level("WARNING", logger="verl"):
        found = kill_one_while_it_generates(cluster, prompts, sampling, ahead=True)
    for name in ("responses", "response_mask", "rollout_log_probs", "weight_version"):
        assert torch.equal(found[name], expected[name])
    assert "another takes its share" in caplog.text and cluster.rollout.engine_seconds() > 0
    cluster.rollout.sync_weights(cluster.actor)
    after = generate(cluster, prompts, sampling)
    assert (after["weight_version"] == expected["weight_version"] + 1).all()
    assert not torch.equal(after["rollout_log_probs"], expected["rollout_log_probs"])


def test_without_another_replica_the_new_weights_draw_what_was_lost(cluster, assets, monkeypatch, caplog):
    prompts, sampling = read_prompts(cluster), requests(4)
    monkeypatch.setattr(cluster.rollout, "replicas", cluster.rollout.replicas[:1])
    monkeypatch.setattr(cluster.rollout, "connected", None)
    version = cluster.rollout.version
    cluster.train(assets, updates=1)
    rollout = cluster.rollout.generate(prompts, sampling, ahead=True)
    ray.kill(cluster.rollout.replicas[0])
    with caplog.at_level("WARNING", logger="verl"):
        found = cluster.rollout.result(rollout)
    assert (found["weight_version"] == version + 1).all() and "the old ones went with it" in caplog.text
    cluster.rollout.sync_weights(cluster.actor)
    assert torch.equal(generate(cluster, prompts, sampling)["responses"], found["responses"])
    monkeypatch.undo()
    cluster.rollout.sync_weights(cluster.actor)  # both are there for the other tests


def test_a_replica_that_died_between_steps_is_there_again_after_the_sync(cluster):
    prompts, sampling = read_prompts(cluster), requests(4)
    expected = generate(cluster, prompts, sampling)
    ray.kill(cluster.rollout.replicas[0])
    cluster.rollout.sync_weights(cluster.actor)
    assert torch.equal(generate(cluster, prompts, sampling)["responses"], expected["responses"])


def test_memory_is_freed_before_engines_fill_it_and_a_connection_lasts(cluster, monkeypatch):
    """On a GPU whatever a sync has left in the trainer's cache is memory that the engine does not find."""
    calls = []
    monkeypatch.setattr(cluster.rollout, "carrier", "collective")
    for name in ("end_sending", "send_through"):
        monkeypatch.setattr(cluster.actor, name, partial(recorded, calls, name, getattr(cluster.actor, name)))
    start_one = Receivers.start_one

    def start(receivers, index, method, *arguments):
        recorded(calls, method.__name__, start_one, receivers, index, method, *arguments)

    monkeypatch.setattr(Receivers, "start_one", start)
    cluster.rollout.sync_weights(cluster.actor)
    cluster.rollout.sync_weights(cluster.actor)
    order = [name for name in calls if name in ("finish_weights", "end_sending", "wake_cache")]
    each = ["finish_weights"] * 2 + ["end_sending"] + ["wake_cache"] * 2
    assert order == each * 2 and calls.count("send_through") == 1


def recorded(calls: list[str], name: str, function, *arguments):
    calls.append(name)
    return function(*arguments)


def test_only_ranks_on_a_receivers_gpu_export_a_handle(cluster, monkeypatch):
    """A handle that no engine opens keeps a model's size on its GPU for ever."""
    seats = [Seat(0, 0.3, ["0", "1"], (0, 1)), Seat(2, 0.3, ["2", "3"], (2, 3))]
    monkeypatch.setattr(cluster.rollout, "seats", seats)
    receivers = Receivers(dict(enumerate(cluster.rollout.replicas)))
    assert cluster.rollout._senders(receivers) == [0, 1, 2, 3]
    receivers.lost[0] = RuntimeError()
    assert cluster.rollout._senders(receivers) == [2, 3]
    layout = cluster.actor.plan_weights()[0]
    cluster.actor.send_through("ipc")
    (sent,) = cluster.actor.workers
    assert ray.get(sent.send_bucket.remote(layout, False)) is None and ray.get(sent.send_bucket.remote(layout, True))
    cluster.actor.end_sending()


def test_a_broadcast_that_nobody_receives_ends(monkeypatch):
    monkeypatch.setattr(weight_sync, "BROADCAST_TIMEOUT", timedelta(seconds=0.5))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = [weight_sync.CollectiveCarrier(torch.device("cpu")) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda rank: ends[rank].connect("127.0.0.1", store.port, rank, 2), range(2)))
    with pytest.raises(TimeoutError, match="weight_sync=collective: a bucket was not received"):
        ends[0].send(torch.zeros(2**28, dtype=torch.uint8))


def test_a_broadcast_ends_for_all_when_one_end_has_died(monkeypatch):
    monkeypatch.setattr(weight_sync, "BROADCAST_TIMEOUT", timedelta(seconds=20))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = [weight_sync.CollectiveCarrier(torch.device("cpu")) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda rank: ends[rank].connect("127.0.0.1", store.port, rank, 3), range(3)))
        received = pool.submit(ends[2].receive, weight_sync.BucketLayout((), 2**20), [])
        ends[1].group = None
        with pytest.raises(RuntimeError, match="onnection"):
            ends[0].send(torch.zeros(2**20, dtype=torch.uint8))
        assert not isinstance(received.exception(), TimeoutError)  # it may have got the bucket before


@pytest.mark.parametrize("carrier", ["object_store", "collective"])
def test_a_replica_that_dies_in_the_middle_of_a_sync_gets_the_weights_afterwards(cluster, assets, monkeypatch, carrier):
    prompts, sampling = read_prompts(cluster), requests(4)
    cluster.train(assets, updates=1)
    monkeypatch.setattr(cluster.rollout, "carrier", carrier)
    begin, killed = type(cluster.rollout)._connect, []

    def connect_and_kill(receivers):
        begin(cluster.rollout, receivers)
        if not killed:
            killed.append(cluster.rollout.process_ids()[1])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(cluster.rollout, "_connect", connect_and_kill)
    cluster.rollout.sync_weights(cluster.actor)
    assert killed and killed[0] not in cluster.rollout.process_ids()
    found = generate(cluster, prompts, sampling)
    batch = join_responses(prompts, found, 3).select([*TOKENS, "mm_inputs"])
    trainer = cluster.log_probs(batch)
    assert (trainer - found["rollout_log_probs"]).abs().max() < 1e-4


def test_a_mistake_in_the_prompts_is_raised_and_not_tried_again(cluster):
    prompts = read_prompts(cluster)
    ids = prompts["prompt_ids"].clone()
    ids[1, -3] = cluster.vision.config.image_token_id
    before = cluster.rollout.process_ids()
    with pytest.raises(ValueError, match="a.parquet:1: the prompt has 1 image tokens, and its 0 image"):
        generate(cluster, prompts.with_columns({"prompt_ids": ids}), requests(4))
    assert cluster.rollout.process_ids() == before


def test_after_too_many_failures_in_a_row_the_engines_own_error_is_shown(cluster, monkeypatch):
    prompts = read_prompts(cluster)
    broken = prompts.with_columns({"prompt_ids": prompts["prompt_ids"].clone().fill_(10**6)})  # outside the vocabulary
    monkeypatch.setattr(cluster.config.worker.rollout, "max_failures", 2)
    with pytest.raises(RuntimeError, match="(?s)failure 2 in a row .*max_failures=2.*own error:.*index out of range"):
        text_only = broken.rows(torch.tensor([1, 1]))
        generate(cluster, text_only, requests(2))
