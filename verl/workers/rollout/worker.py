"""RolloutWorker: one engine in a process of its own, so that its threads and crashes stay out of the trainer."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from verl.config.config import Config
from verl.data.vision import load_special_tokens
from verl.protocol import DataProto
from verl.utils.process import start_model_worker
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.engines import ENGINES
from verl.workers.rollout.weight_sync import BucketLayout


class RolloutWorker:
    """Hosts the engine named by `worker.rollout.name`; `version` is that of the weights it has."""

    def __init__(
        self, config: Config, device_type: str, threads: int, replica: int, visible_gpus: list[str] | None
    ) -> None:
        if visible_gpus is not None:  # before anything asks CUDA what there is
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus)
        start_model_worker(f"rollout[{replica}]", threads)
        model = config.worker.actor.model
        self.special = load_special_tokens(model.model_path, model.trust_remote_code)
        device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        self.engine = ENGINES[config.worker.rollout.name](config, self.special, device)
        self.version = 0
        self.seconds = 0.0  # that the last generation took

    def engine_seconds(self) -> float:
        return self.seconds

    def ready(self) -> int:
        """Returns, with the process id, when the engine has been built; raises what kept it from that."""
        return os.getpid()

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        """The engine's responses, each stamped with the version of the weights that made it."""
        start = time.perf_counter()
        responses = self.engine.generate(prompts, sampling)
        self.seconds = time.perf_counter() - start
        uids = [uid for uid, params in zip(prompts["uid"], sampling, strict=True) for _ in range(params.n)]
        check_responses(responses, self.special.banned, uids)
        return responses.with_columns({"weight_version": torch.full((len(responses),), self.version)})

    def receive_from(self, carrier: str, host: str | None, port: int, first_rank: int, size: int) -> None:
        self.engine.receive_from(carrier, host, port, first_rank, size)

    def begin_weights(self) -> None:
        self.engine.begin_weights()

    def load_bucket(self, layout: BucketLayout, *payloads: Any) -> None:
        """Take one bucket; Ray has fetched by now what the payloads' references stand for."""
        self.engine.load_bucket(layout, list(payloads))

    def finish_weights(self, version: int) -> None:
        self.engine.finish_weights()
        self.version = version

    def sleep(self) -> None:
        self.engine.sleep()

    def wake_weights(self) -> None:
        self.engine.wake_weights()

    def wake_cache(self) -> None:
        self.engine.wake_cache()


def check_responses(responses: DataProto, banned: tuple[int, ...], uids: list[str]) -> None:
    """Raise ValueError where a response holds a token that stands for an image, which would break the trainer."""
    found = torch.isin(responses["responses"], torch.tensor(banned)) & responses["response_mask"].bool()
    if found.any():
        row = int(found.any(dim=1).nonzero()[0])
        token = int(responses["responses"][row][found[row]][0])
        raise ValueError(f"{uids[row]}: a response holds the modality token {token}, which engines must never sample")
