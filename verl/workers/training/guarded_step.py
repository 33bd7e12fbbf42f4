"""One optimizer update that only happens where it is sound."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from verl.metrics.bag import MetricBag

logger = logging.getLogger(__name__)


@dataclass
class GuardedStep:
    """Clips and applies gradients; where one or a loss is not finite, all ranks drop the update and say so.

    `role` is `actor` or `critic`, in messages and in the names of metrics.
    """

    role: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float
    max_skipped: int
    device: torch.device
    skipped_in_a_row: int = 0

    def widen_gradients(self) -> None:
        """Widen, behind each backward, what was added up: gradients of bfloat16 weights add up in float32, since the
        sum of 40 micro-batches in bfloat16 would lose all but the first few of them."""
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad.dtype == torch.bfloat16:
                gradient, parameter.grad = parameter.grad.float(), None
                parameter.grad_dtype = None  # any
                parameter.grad = gradient

    def __call__(self, metrics: MetricBag, faults: set[str]) -> None:
        """Update from the gradients that are in the parameters. All ranks call this together.

        Args:
            faults: names of what was not finite on this rank; emptied.

        Raises:
            RuntimeError: `max_skipped` updates in a row were not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # A loss may be NaN where its gradient is 0 (a clamp hides it), so both are asked, and all ranks agree.
        anywhere = torch.tensor(len(faults), device=self.device)
        dist.all_reduce(anywhere)
        healthy = bool(torch.isfinite(norm)) and not anywhere
        if healthy:
            self.skipped_in_a_row = 0
            metrics.add(f"{self.role}/lr", self.schedule.get_last_lr()[0])
            metrics.add(f"{self.role}/grad_norm", norm.item())
            self.optimizer.step()
            self.schedule.step()
        else:
            self.skipped_in_a_row += 1
            logger.error(
                "SKIPPED an update (%d in a row): loss or gradient is not finite (gradient norm %s). "
                "Loss terms at fault: %s",
                self.skipped_in_a_row,
                norm.item(),
                ", ".join(sorted(faults))
                or "none on this rank; the model's own backward overflowed, or a term on another rank",
            )
        for name in faults:
            metrics.add(f"{self.role}/nonfinite/{name}", 1)
        faults.clear()
        metrics.add(f"{self.role}/skipped_frac", not healthy)
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= self.max_skipped:
            raise RuntimeError(
                f"{self.skipped_in_a_row} updates in a row were not finite "
                f"(worker.{self.role}.max_skipped_updates): training has diverged"
            )
