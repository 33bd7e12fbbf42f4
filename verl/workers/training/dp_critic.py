"""The data-parallel critic: values without gradient, and their update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from verl.algorithms.losses.compose import Denominators, reduce_values
from verl.algorithms.losses.value import value_loss
from verl.columns import ORIGINAL
from verl.config.worker import PASS_BUDGET, CriticConfig
from verl.metrics.bag import MetricBag
from verl.models.forward import model_inputs
from verl.models.value import ValueModel
from verl.protocol import DataProto
from verl.workers.training.balance import micro_batches
from verl.workers.training.guarded_step import GuardedStep


@dataclass
class DataParallelCritic:
    """Updates a sharded value model. Every rank holds one with its own rows and calls it in step with the others."""

    model: ValueModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    config: CriticConfig
    max_response_length: int
    device: torch.device
    faults: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        limits = (self.config.max_grad_norm, self.config.max_skipped_updates)
        self.step = GuardedStep("critic", self.model, self.optimizer, self.schedule, *limits, self.device)

    @torch.no_grad()
    def compute_values(self, batch: DataProto) -> torch.Tensor:
        """Values [B, R] float32 before each response token, on CPU; 0 at padding."""
        self.model.eval()
        found = torch.zeros(batch["response_mask"].shape)
        budget = PASS_BUDGET * self.config.max_tokens_per_micro_batch
        for places, rows in micro_batches(batch, [ORIGINAL], budget, self.device):
            found[places] = self._forward(rows)[: len(places)].cpu()
        return found

    def update_critic(self, batch: DataProto, sizes: Sequence[int]) -> MetricBag:
        """One optimizer update per mini-batch and epoch.

        Args:
            batch: this rank's rows, mini-batch after mini-batch; besides the tokens `values`, as they were before the
                updates, and `returns`, both [B, R].
            sizes: rows of each mini-batch.

        Returns:
            this rank's metrics, to be merged over ranks.

        Raises:
            RuntimeError: `max_skipped_updates` updates in a row were not finite.
        """
        self.model.train()
        metrics = MetricBag()
        for _ in range(self.config.ppo_epochs):
            for mini_batch in batch.split(sizes):
                counts = Denominators.count(mini_batch["response_mask"].sum(-1)).to(self.device)
                dist.all_reduce(counts)
                denominators = Denominators(*counts.tolist(), self.max_response_length)
                budget = self.config.max_tokens_per_micro_batch
                for _, rows in micro_batches(mini_batch, [ORIGINAL], budget, self.device):
                    self._backward(rows, denominators, metrics)
                self.step(metrics, self.faults)
        return metrics

    def _backward(self, rows: DataProto, denominators: Denominators, metrics: MetricBag) -> None:
        """Forward, loss and backward of one micro-batch; gradients add up in the parameters."""
        values = self._forward(rows)
        names = ("values", "returns", "response_mask")
        old_values, returns, mask = (rows[name].to(self.device) for name in names)
        losses, clipped = value_loss(values, old_values, returns, self.config.cliprange_value)
        loss = reduce_values(losses, mask, mask.sum(-1), self.config.loss_avg_mode, denominators)
        metrics.add_tokens("critic/vf_loss", losses.detach(), mask)
        metrics.add_tokens("critic/vf_clip_frac", clipped, mask)
        metrics.add_tokens("critic/value", values.detach(), mask)
        metrics.add_tokens("critic/return", returns, mask)
        if not torch.isfinite(loss):
            self.faults.add("value")
        # FSDP averages over ranks; the denominators are global already, so the shares must be summed.
        (loss * dist.get_world_size()).backward()
        self.step.widen_gradients()

    def _forward(self, rows: DataProto) -> torch.Tensor:
        """Values [B, R]."""
        return self.model(**model_inputs(rows, self.device))
