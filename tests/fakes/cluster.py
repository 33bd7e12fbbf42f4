"""A trainer of one rank and rollout replicas in real Ray workers, without a driver around them."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from tests.fakes.rollouts import make_batch
from tests.fakes.rows import row
from verl.algorithms.losses.compose import build_terms, coefficients
from verl.columns import ORIGINAL
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto
from verl.single_controller.resources import plan_layout
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ActorGroup
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.worker import RolloutWorker
from verl.workers.training.balance import Share

# Prompts with no, one and two images.
MIXED = [row(), row("How much is 1+1? Think.", images=0), row("<image>+<image>", images=2, width=84), row("<image>?")]


@dataclass
class Cluster:
    config: Config
    actor: ActorGroup
    rollout: RolloutGroup
    vision: VisionProcessor

    def weights(self) -> dict[str, torch.Tensor]:
        """The actor's weights, as they are sent."""
        self.actor.send_through("object_store")
        self.rollout.connected = None  # the actor has let go of the carrier that was open
        found = {}
        for layout in self.actor.plan_weights():
            data = torch.from_numpy(ray.get(self.actor.send_bucket(layout)[0]).copy())
            found |= dict(layout.unpack(data))
        self.actor.end_sending()
        return found

    def train(self, assets: Path, updates: int = 3) -> None:
        """Move every weight of the actor, by real updates."""
        coefs = coefficients(build_terms(self.config.algorithm.terms), 1, 1)
        batch = make_batch(assets)
        self._hand_out(batch)
        for _ in range(updates):
            self.actor.update_policy(DataProto(batch.tensors), coefs)

    def log_probs(self, batch: DataProto) -> torch.Tensor:
        """The trainer's log-probs [B, R]."""
        self._hand_out(batch)
        return self.actor.compute_log_probs(ORIGINAL)["log_probs"]

    def _hand_out(self, batch: DataProto) -> None:
        self.actor.take_rows([ray.put(batch)], [Share(torch.arange(len(batch)), [len(batch)])])

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        return self.rollout.result(self.rollout.generate(prompts, sampling))

    def stop(self) -> None:
        self.rollout.stop()
        for worker in self.actor.workers:
            ray.kill(worker)


def start_cluster(model: Path, data: str, *overrides: str) -> Cluster:
    config = compose_config(
        "quickstart",
        [
            f"data.train_files={data}",
            "data.val_files=null",
            "data.format_prompt=null",
            f"worker.actor.model.model_path={model}",
            "worker.actor.optim.lr=0.01",
            "worker.actor.optim.lr_warmup_steps=0",
            "worker.actor.fsdp.min_block_params=0",
            "worker.rollout.sync_bucket_mb=1",
            "data.max_response_length=300",
            "trainer.n_gpus_per_node=1",
            "algorithm.views.masked.grad=true",
            *overrides,
        ],
    )
    layout = plan_layout(config.trainer, config.worker.rollout)
    vision = VisionProcessor(str(model), 784, 12544)
    actor = ActorGroup(config, layout, None)
    rollout = RolloutGroup(config, layout, None, vision.special.pad)
    actor.build(total_updates=10)
    rollout.build()
    return Cluster(config, actor, rollout, vision)


def read_prompts(cluster: Cluster) -> DataProto:
    dataset = PromptDataset(cluster.config.data.train_files, "k", cluster.config.data, cluster.vision)
    return PromptCollator(cluster.vision.special.pad)([dataset[i] for i in range(len(dataset))])


def requests(count: int, **changes) -> list[SamplingParams]:
    base = SamplingParams(n=3, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12, seed=0)
    return [replace(base, seed=100 + i, **changes) for i in range(count)]


def kill_one_while_it_generates(
    cluster: Cluster, prompts: DataProto, sampling: list[SamplingParams], ahead: bool = False
) -> DataProto:
    """The responses, where replica 1 gets a SIGKILL when it has generated its share and not yet answered."""
    process = cluster.rollout.process_ids()[1]
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        ray.get(cluster.rollout.replicas[1].__ray_call__.remote(_never_answer, begun))
        rollout = cluster.rollout.generate(prompts, sampling, ahead)
        while not begun.exists():
            assert not ray.wait([rollout.answers[1]], timeout=0.01)[0], ray.get(rollout.answers[1])
    os.kill(process, signal.SIGKILL)
    result = cluster.rollout.result(rollout)
    assert ahead or cluster.rollout.process_ids()[1] != process
    return result


def _never_answer(worker: RolloutWorker, begun: Path) -> None:
    generate = worker.engine.generate

    def gated(prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        generate(prompts, sampling)
        begun.touch()
        threading.Event().wait()
        raise AssertionError("it was to be killed")

    worker.engine.generate = gated
