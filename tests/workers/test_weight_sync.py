"""Buckets and the carriers that move them between processes."""

from __future__ import annotations

import pytest
import ray
import torch

from verl.workers.rollout.weight_sync import CARRIERS, BucketLayout, plan_buckets

CPU = torch.device("cpu")
WEIGHTS = {  # the same in every process
    "a": torch.arange(15.0).view(3, 5) / 7,
    "b": torch.arange(7.0).bfloat16() / 3,
    "c": torch.tensor(2.5),
    "d": torch.arange(6).view(2, 3),
    "e": torch.arange(1000.0) / 11,
    "f": torch.zeros(0, 4),
}


def layouts(bucket_bytes: int) -> list[BucketLayout]:
    return plan_buckets(((n, w.dtype, tuple(w.shape)) for n, w in WEIGHTS.items()), bucket_bytes)


def packed(layout: BucketLayout) -> torch.Tensor:
    data = layout.empty(CPU)
    layout.pack((WEIGHTS[entry.name] for entry in layout.entries), data)
    return data


@pytest.mark.parametrize(("bucket_bytes", "count"), [(1, 6), (64, 5), (10_000, 1)])
def test_buckets_hold_every_dtype_and_shape_exactly(bucket_bytes, count):
    found = {}
    for layout in layouts(bucket_bytes):
        assert layout.num_bytes <= bucket_bytes or len(layout.entries) == 1
        found |= {name: weight.clone() for name, weight in layout.unpack(packed(layout))}
    assert len(layouts(bucket_bytes)) == count and list(found) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight)


@ray.remote
class Sender:
    def __init__(self, carrier: str) -> None:
        self.carrier = CARRIERS[carrier](CPU)

    def open(self) -> int:
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def connect(self, port: int, size: int) -> None:
        self.carrier.connect("127.0.0.1", port, 0, size)

    def send(self, layout: BucketLayout):
        return self.carrier.send(packed(layout))


@ray.remote
class Receiver:
    def __init__(self, carrier: str) -> None:
        self.carrier = CARRIERS[carrier](CPU)

    def connect(self, port: int, rank: int, size: int) -> None:
        self.carrier.connect("127.0.0.1", port, rank, size)

    def receive(self, layout: BucketLayout, *payloads) -> dict[str, torch.Tensor]:
        return {name: w.clone() for name, w in layout.unpack(self.carrier.receive(layout, list(payloads)))}


@pytest.mark.parametrize("name", ["object_store", "ipc", "collective"])
def test_every_carrier_takes_buckets_to_several_processes(ray_cluster, name):
    sender, receivers = Sender.remote(name), [Receiver.remote(name) for _ in range(2)]
    if CARRIERS[name].together:
        port = ray.get(sender.open.remote())
        meet = [sender.connect.remote(port, 3)]
        ray.get(meet + [receiver.connect.remote(port, i, 3) for i, receiver in enumerate(receivers, start=1)])
    found = [{}, {}]
    for layout in layouts(64):
        payload = sender.send.remote(layout)
        arguments = [] if CARRIERS[name].together else [payload]
        answers = [receiver.receive.remote(layout, *arguments) for receiver in receivers]
        for weights, answer in zip(found, ray.get(answers), strict=True):
            weights |= answer
    for weights in found:
        assert list(weights) == list(WEIGHTS)
        assert all(torch.equal(weights[name], weight) for name, weight in WEIGHTS.items())


def test_an_engine_on_another_gpu_than_the_trainers_is_told_what_to_use():
    carrier = CARRIERS["ipc"](CPU)
    with pytest.raises(ValueError, match="runs on cpu and the training ranks on GPU 1.*weight_sync=collective"):
        carrier.receive(layouts(64)[0], [("GPU 1", ())])
