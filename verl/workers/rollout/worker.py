"""RolloutWorker: one engine in a process of its own, so that its threads and crashes stay out of the trainer."""

from __future__ import annotations

import ray
import torch

from verl.config.config import Config
from verl.data.vision import load_special_tokens
from verl.protocol import DataProto
from verl.utils.process import start_model_worker
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.engines import ENGINES
from verl.workers.rollout.weight_sync import ObjectStoreSync


class RolloutWorker:
    """Hosts the engine named by `worker.rollout.name`; `version` counts the weight syncs it has taken."""

    def __init__(self, config: Config, device_type: str, threads: int) -> None:
        start_model_worker("rollout", threads)
        model = config.worker.actor.model
        special = load_special_tokens(model.model_path, model.trust_remote_code)
        device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        self.engine = ENGINES[config.worker.rollout.name](config, special, device)
        self.carrier = ObjectStoreSync(config.worker.rollout.sync_bucket_mb * 2**20)
        self.version = 0

    def ready(self) -> bool:
        """Returns when the engine has been built; lets the driver wait for it, or see why it was not."""
        return True

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        """The engine's responses, stamped with the version of the weights that made them."""
        responses = self.engine.generate(prompts, sampling)
        responses.meta["weight_version"] = self.version
        return responses

    def load_weights(self, references: list[ray.ObjectRef], version: int) -> None:
        """Take the weights that `ActorWorker.send_weights` put into the object store."""
        self.engine.load_weights(self.carrier.receive(references))
        self.version = version
