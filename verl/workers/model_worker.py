"""Training-side Ray workers: one FSDP rank of the actor, the reference or the critic each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from operator import attrgetter
from typing import Any

import ray
import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download

from verl.algorithms.losses.compose import build_terms
from verl.algorithms.requirements import requirements_of
from verl.checkpoint.files import FileEntry, first_line
from verl.checkpoint.tensors import SaveFailed
from verl.columns import ORIGINAL
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import PASS_BUDGET, FSDPConfig, LoRAConfig, ModelConfig, Offload
from verl.data.vision import load_special_tokens
from verl.metrics.bag import MetricBag
from verl.metrics.machine import peak_flops
from verl.models.loading import resolve_dtype
from verl.models.lora import adapter_off
from verl.models.policy import PolicyModel
from verl.models.value import ValueModel
from verl.protocol import DataProto
from verl.utils.process import keep_freed_memory, prepare_gloo, start_model_worker
from verl.workers.fsdp.checkpoint import StateWriter, load_state, model_tensors, optimizer_tensors, plain_state
from verl.workers.fsdp.export import plain_weights, save_description, save_huggingface
from verl.workers.fsdp.parking import Parking
from verl.workers.fsdp.wrap import build_sharded
from verl.workers.memory import explain_oom, peak_memory
from verl.workers.rollout.weight_sync import CARRIERS, BucketLayout, plan_buckets
from verl.workers.training.dp_actor import DataParallelActor, compute_log_probs
from verl.workers.training.dp_critic import DataParallelCritic
from verl.workers.training.guarded_step import GuardedStep
from verl.workers.training.optim import build_optimizer, build_schedule, weight_dtype

FETCHED = [f"*.{kind}" for kind in ("json", "safetensors", "txt", "jinja", "model", "py")]


class ModelWorker:
    """One rank: joins the others' process group and holds one shard of a model."""

    def __init__(self, role: str, config: Config, rank: int, world_size: int, device_type: str, threads: int) -> None:
        start_model_worker(f"{role}[{rank}]", threads)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.parking: Parking | None = None
        self.device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        if device_type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN under some masks (pytorch#196678)
        else:
            keep_freed_memory()
        torch.manual_seed(config.trainer.seed)

    def open_store(self) -> tuple[str, int]:
        """Open, on rank 0, the store where ranks meet, on a port that the system chooses; returns (host, port)."""
        host = self.host()
        self.store = dist.TCPStore(host, 0, self.world_size, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def host(self) -> str:
        """The address under which other processes of the run reach this one."""
        return ray.util.get_node_ip_address() if self.config.trainer.nnodes > 1 else "127.0.0.1"

    def join(self, host: str, port: int) -> None:
        """Join the process group; returns when all ranks have."""
        if self.rank != 0:
            self.store = dist.TCPStore(host, port, self.world_size, is_master=False)
        prepare_gloo(self.host())
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        worker = self.config.worker
        if backend == "nccl" and any(
            part.fsdp.offload == Offload.always for part in (worker.actor, worker.ref, worker.critic)
        ):
            backend = "cpu:gloo,cuda:nccl"  # gradient norms and full weights are gathered from main memory
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world_size)
        self.writer = StateWriter()  # now, so that ranks which cannot reach each other fail at the start

    def fetch(self, path: str) -> None:
        """Fetch, on rank 0, a model from the hub; the others wait for it here. In a collective they would wait for ten
        minutes and then end the run."""
        if os.path.isdir(path):
            return
        if self.rank == 0:
            snapshot_download(path, allow_patterns=FETCHED)
            self.store.set(path, "fetched")
        else:
            self.store.wait([path], timedelta(hours=24))

    def training(self) -> GuardedStep:
        """The model that this worker trains, with its optimizer and schedule."""
        raise NotImplementedError(f"{type(self).__name__} trains nothing")

    def park_where(self, fsdp: FSDPConfig) -> None:
        """Park weights and states from now on between the phases of a step, if `fsdp` says so."""
        self.parking = Parking() if fsdp.offload == Offload.between_phases else None
        self.park()

    def park(self, weights: bool = True) -> None:
        """Leave the device to others: weights and optimizer states, or the states alone, go to main memory."""
        if self.parking is not None:
            self.parking.park([*(self.weights() if weights else ()), *self.states()])
        self.free_cache()

    def take_back(self, states: bool = True) -> None:
        """Bring back what is parked, or the weights alone."""
        if self.parking is not None:
            self.parking.take_back(None if states else self.weights())

    def weights(self) -> Iterable[torch.Tensor]:
        """The parameters of the model."""
        return self.training().model.parameters()

    def states(self) -> list[torch.Tensor]:
        """The tensors that the optimizer keeps for each parameter, counters apart."""
        kept = self.training().optimizer.state.values()
        return [value for state in kept for value in state.values() if value.dim()]

    def describe(self, folder: str) -> None:
        """Write the files of a role's checkpoint folder besides its tensors."""

    def start_save(self, folder: str, optimizer: bool, background: bool) -> None:
        """Begin to write this rank's part of a checkpoint; all ranks call this together. In the background it is
        written from a copy while training goes on."""
        step = self.training()
        tensors = model_tensors(step.model) | (optimizer_tensors(step) if optimizer else {})
        if self.parking is not None:  # engines may be awake: nothing is taken back for a save
            tensors = {name: self.parking.read(tensor) for name, tensor in tensors.items()}
        self.writer.start(folder, tensors, plain_state(step), self.describe, background)

    def save_is_done(self) -> bool:
        return self.writer.done()

    def finish_save(self) -> dict[str, FileEntry] | str:
        """Wait for the end of a save; returns this rank's files in the role's folder, or why there are none."""
        try:
            return self.writer.finish()
        except SaveFailed as error:
            return str(error)
        except Exception as error:  # torch and tokenizers raise errors of their own where a disk is full
            return f"rank {self.rank}: {first_line(error)}"

    def load_state(self, folder: str) -> None:
        """Go on from a checkpoint's folder of this role; all ranks call this together."""
        self.take_back()
        load_state(folder, self.training(), self.rank)
        self.park()

    def take_rows(self, rows: DataProto, sizes: list[int]) -> None:
        """Keep this rank's rows of a step, mini-batch after mini-batch of these sizes, for its passes and updates."""
        self.rows, self.sizes = rows, sizes

    def free_cache(self) -> None:
        """Return cached memory to the GPU, which other workers share."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_memory(self) -> tuple[int, int | None]:
        """See verl/workers/memory.py."""
        return peak_memory(self.device)

    def settings(self, *keys: str) -> dict[str, object]:
        """The settings that decide on the memory of a pass, by config key: `keys`, and those of all passes."""
        shared = ("data.max_prompt_length", "data.max_response_length", "worker.rollout.gpu_memory_utilization")
        return {key: attrgetter(key)(self.config) for key in (*keys, *shared)}


class PolicyWorker(ModelWorker):
    """A rank of a policy."""

    def load(self, model: ModelConfig, fsdp: FSDPConfig, dtype: torch.dtype) -> None:
        """Load and shard the model, weights in `dtype`. All ranks call this together."""
        self.fetch(model.model_path)
        special = load_special_tokens(model.model_path, model.trust_remote_code)
        chunk = self.config.worker.actor.logits_chunk_size
        temperature = self.config.worker.rollout.temperature
        wrap = partial(PolicyModel, banned=special.banned, temperature=temperature, logits_chunk_size=chunk)
        self.policy = build_sharded(model, fsdp, wrap, self.device, dtype, self.config.trainer.n_gpus_per_node)

    def compute_log_probs(self, views: Sequence[str], exact: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Log-probs [B, R] of this rank's rows under each view, and `exact` columns, without gradient."""
        self.take_back()
        budget = PASS_BUDGET * self.config.worker.actor.max_tokens_per_micro_batch
        keys = ("worker.actor.max_tokens_per_micro_batch", "worker.actor.logits_chunk_size")
        with explain_oom("the log-probs", self.settings(*keys)):
            found = compute_log_probs(self.policy, self.rows, views, budget, self.device, exact)
        self.free_cache()
        return found


class ReferenceWorker(PolicyWorker):
    """The frozen reference policy."""

    def build(self) -> None:
        ref = self.config.worker.ref
        model = self.config.worker.actor.model
        frozen = replace(
            model,
            model_path=ref.model_path or model.model_path,
            enable_gradient_checkpointing=False,
            lora=LoRAConfig(),
        )
        # Weights that are not trained lose nothing by being kept as the forward wants them.
        self.load(frozen, ref.fsdp, resolve_dtype(ref.fsdp.compute_dtype, self.device.type))
        self.policy.requires_grad_(False)
        self.park_where(ref.fsdp)

    def weights(self) -> Iterable[torch.Tensor]:
        return self.policy.parameters()

    def states(self) -> list[torch.Tensor]:
        return []

    def compute_log_probs(self, views: Sequence[str], exact: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        found = super().compute_log_probs(views, exact)
        self.park()
        return found


class CriticWorker(ModelWorker):
    """The values that PPO's advantages are made of, and their training."""

    def build(self, total_updates: int) -> None:
        """Load model and optimizer."""
        critic, actor = self.config.worker.critic, self.config.worker.actor
        model = replace(
            actor.model,
            model_path=critic.model_path or actor.model.model_path,
            enable_gradient_checkpointing=critic.enable_gradient_checkpointing,
            lora=LoRAConfig(),  # an adapter is the actor's alone
        )
        self.fetch(model.model_path)
        dtype, per_node = weight_dtype(critic.optim), self.config.trainer.n_gpus_per_node
        values = build_sharded(model, critic.fsdp, ValueModel, self.device, dtype, per_node)
        optimizer = build_optimizer([p for p in values.parameters() if p.requires_grad], critic.optim)
        schedule = build_schedule(optimizer, critic.optim, total_updates)
        longest = self.config.data.max_response_length
        self.critic = DataParallelCritic(values, optimizer, schedule, critic, longest, self.device)
        self.park_where(critic.fsdp)

    def training(self) -> GuardedStep:
        return self.critic.step

    def compute_values(self) -> dict[str, torch.Tensor]:
        """`values` [B, R] of this rank's rows, without gradient."""
        self.take_back()
        with explain_oom("the values", self.settings("worker.critic.max_tokens_per_micro_batch")):
            values = self.critic.compute_values(self.rows)
        self.free_cache()
        return {"values": values}

    def update_critic(self, columns: DataProto) -> MetricBag:
        """All updates of one step on this rank's rows; returns its metrics."""
        rows = self.rows.with_columns(columns.tensors)
        keys = ("max_tokens_per_micro_batch", "enable_gradient_checkpointing", "fsdp.reshard_after_forward")
        self.take_back()
        with explain_oom("the critic's update", self.settings(*(f"worker.critic.{key}" for key in keys))):
            metrics = self.critic.update_critic(rows, self.sizes)
        self.park()
        return metrics


class ActorWorker(PolicyWorker):
    """The policy that is trained."""

    def build(self, total_updates: int) -> int:
        """Load model and optimizer; returns the model's number of parameters."""
        actor, algorithm = self.config.worker.actor, self.config.algorithm
        self.load(actor.model, actor.fsdp, weight_dtype(actor.optim))
        terms = build_terms(algorithm.terms)
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = build_optimizer(trainable, actor.optim)
        self.actor = DataParallelActor(
            policy=self.policy,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, actor.optim, total_updates),
            terms=terms,
            requirements=requirements_of(algorithm, compute_sizes(self.config).updates_per_step),
            old_log_probs=algorithm.old_log_probs,
            config=actor,
            max_response_length=self.config.data.max_response_length,
            device=self.device,
        )
        if self.actor.requirements.live_views:  # what of them is shown, only the update knows
            self.actor.show = self.config.trainer.samples_per_step
        self.park_where(actor.fsdp)
        return sum(p.numel() for p in self.policy.parameters())

    def training(self) -> GuardedStep:
        return self.actor.step

    def describe(self, folder: str) -> None:
        save_description(self.policy, self.config.worker.actor.model, os.path.join(folder, "huggingface"))

    def compute_log_probs(self, views: Sequence[str], exact: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """As above; the columns also stay here, for the update."""
        found = super().compute_log_probs(views, exact)
        kept = {"old_log_probs" if name == "log_probs" else name: column for name, column in found.items()}
        self.rows = self.rows.with_columns(kept)
        return found

    def compute_reference_log_probs(self) -> dict[str, torch.Tensor]:
        """`log_probs` [B, R] of this rank's rows by the model without its adapter, without gradient."""
        with adapter_off(self.policy.inner):
            return super().compute_log_probs([ORIGINAL])

    def update_policy(self, columns: DataProto, coefs: dict[str, float]) -> MetricBag:
        """All updates of one step on this rank's rows; returns its metrics."""
        rows = self.rows.with_columns(columns.tensors)
        keys = (
            "max_tokens_per_micro_batch",
            "logits_chunk_size",
            "model.enable_gradient_checkpointing",
            "fsdp.reshard_after_forward",
        )
        self.take_back()
        start = time.perf_counter()
        with explain_oom("the policy's update", self.settings(*(f"worker.actor.{key}" for key in keys))):
            metrics = self.actor.update_policy(rows, self.sizes, coefs)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        if (peak := peak_flops(device, self.config.trainer.peak_tflops)) is not None:
            metrics.add("perf/mfu", self.actor.operations(rows) / (time.perf_counter() - start) / peak)
        return metrics

    def shown(self) -> dict[int, dict[str, torch.Tensor]]:
        """See DataParallelActor."""
        return self.actor.shown

    def send_through(self, carrier: str) -> tuple[str, int] | None:
        """Prepare a carrier; where sender and receivers must meet, returns (host, port) on the sending rank."""
        self.carrier = CARRIERS[carrier](self.device)
        if not self.carrier.together or self.rank != 0:
            return None
        self.sync_store = dist.TCPStore(self.host(), 0, is_master=True, wait_for_workers=False)
        return self.host(), self.sync_store.port

    def meet_receivers(self, host: str, port: int, size: int) -> None:
        self.carrier.connect(host, port, 0, size)

    def plan_weights(self) -> list[BucketLayout]:
        """The cuts of the weights, the same on every rank. A tied head is sent under its own name too: an
        engine may hold a copy of it. Adapters are sent merged: engines would ignore those of a vision tower."""
        dtype = resolve_dtype(self.config.worker.actor.fsdp.compute_dtype, self.device.type)
        self.park(weights=False)  # an engine on this GPU is about to wake up
        self.take_back(states=False)
        self.sent_weights = plain_weights(self.policy.inner)
        stored = {name: weight.stored for name, weight in self.sent_weights.items()}
        shapes = (
            (name, dtype if weight.is_floating_point() else weight.dtype, tuple(weight.shape))
            for name, weight in stored.items()
        )
        return plan_buckets(shapes, self.config.worker.rollout.sync_bucket_mb * 2**20)

    @torch.no_grad()
    def send_bucket(self, layout: BucketLayout, sends: bool) -> Any:
        """Gather one bucket's weights from all ranks, which call this together, and hand them to the carrier, where
        this rank `sends`: what nobody receives would stay in memory."""
        weights = (self.sent_weights[entry.name].whole(self.device, entry.dtype) for entry in layout.entries)
        if not sends:
            for _ in weights:
                pass
            return None
        data = layout.empty(self.device)
        layout.pack(weights, data)
        return self.carrier.send(data)

    def end_sending(self) -> None:
        """Free all that sending took, before the engines on this GPU fill it."""
        self.sent_weights = {}
        self.carrier.release()
        self.park()

    def save_huggingface(self, path: str) -> None:
        """Write the policy as an ordinary Hugging Face folder; all ranks call this together, rank 0 writes."""
        self.take_back()
        save_huggingface(self.policy, self.config.worker.actor.model, path)
