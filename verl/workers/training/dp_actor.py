"""The data-parallel actor: log-probs without gradient, and the policy update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from verl.algorithms.losses.compose import Denominators, LossTerm, compute_losses
from verl.algorithms.losses.estimators import k3
from verl.algorithms.requirements import Requirements
from verl.columns import ORIGINAL, view_column
from verl.config.algorithm import OldLogProbs
from verl.config.worker import ActorConfig
from verl.metrics.bag import MetricBag
from verl.models.families import family_of
from verl.models.forward import forward_views
from verl.models.policy import PolicyModel
from verl.protocol import DataProto
from verl.workers.training.balance import Work, micro_batches
from verl.workers.training.guarded_step import GuardedStep

ALL = ""  # stands for all valid tokens among the denominators of the terms


@torch.no_grad()
def compute_log_probs(
    policy: PolicyModel,
    batch: DataProto,
    views: Sequence[str],
    budget: int,
    device: torch.device,
    exact: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Log-probs [B, R] float32 of the responses under each view, by column, on CPU, without gradient.

    Args:
        budget: Computed tokens of a micro-batch.
        exact: Further columns, over the whole vocabulary (see forward_views).
    """
    policy.eval()
    names = [*(view_column(view, "log_probs") for view in views), *exact]
    found = {name: torch.zeros(batch["response_mask"].shape) for name in names}
    for places, rows in micro_batches(batch, views, budget, device):
        for name, column in forward_views(policy, rows, views, device, exact).items():
            found[name][places] = column[: len(places)].float().cpu()
    return found


def add_mismatch(metrics: MetricBag, log_probs: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> None:
    """Add the distance of engine and trainer, where no pass before the updates tells (see `rollout_metrics`)."""
    log_probs, rollout = (torch.where(mask.bool(), column.double(), 0.0) for column in (log_probs, rollout))
    difference = (log_probs - rollout).abs()
    metrics.add_tokens("rollout/log_prob_diff_mean", difference, mask)
    metrics.add_tokens("rollout/mismatch_kl", k3(rollout, log_probs), mask)
    metrics.add_max("rollout/log_prob_diff_max", difference.max().item())


@dataclass
class DataParallelActor:
    """Updates a sharded policy. Every rank holds one with its own rows and calls it in step with the others.

    Attributes:
        show: Number of the step's first rows that are kept in `shown`: by row, the columns [R] that the first forward
            of an update computed for them, for people to look at.
    """

    policy: PolicyModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    terms: list[LossTerm]
    requirements: Requirements
    old_log_probs: OldLogProbs
    config: ActorConfig
    max_response_length: int
    device: torch.device
    show: int = 0
    shown: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    nonfinite_terms: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        limits = (self.config.max_grad_norm, self.config.max_skipped_updates)
        self.step = GuardedStep("actor", self.policy, self.optimizer, self.schedule, *limits, self.device)

    def update_policy(self, batch: DataProto, sizes: Sequence[int], coefs: Mapping[str, float]) -> MetricBag:
        """Clipped policy loss plus every other term; one optimizer update per mini-batch and epoch.

        Args:
            batch: This rank's rows, mini-batch after mini-batch.
            sizes: Rows of each mini-batch.
            coefs: Coefficient of each term in this step, by name.

        Returns:
            This rank's metrics, to be merged over ranks.

        Raises:
            RuntimeError: `max_skipped_updates` updates in a row were not finite.
        """
        self.policy.train()
        metrics, self.shown = MetricBag(), {}
        views, budget = [ORIGINAL, *self.requirements.live_views], self.config.max_tokens_per_micro_batch
        for epoch in range(self.config.ppo_epochs):
            for number, mini_batch in enumerate(batch.split(sizes)):
                denominators = self._count(mini_batch)
                for _, rows in micro_batches(mini_batch, views, budget, self.device):
                    metrics.add_total("perf/tokens_computed", Work(rows, views).tokens(range(len(rows))))
                    self._backward(rows, denominators, metrics, coefs, first=epoch == number == 0)
                self.step(metrics, self.nonfinite_terms)
        return metrics

    def _count(self, mini_batch: DataProto) -> dict[str, Denominators]:
        """The denominators of each term: its tokens and sequences in the mini-batch over all ranks."""
        columns = mini_batch.tensors
        counted = [mini_batch["response_mask"].sum(-1), *(term.counted(columns) for term in self.terms)]
        counts = torch.stack([Denominators.count(count) for count in counted])
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        names = [ALL, *(term.name for term in self.terms)]
        pairs = zip(names, counts.tolist(), strict=True)
        return {name: Denominators(*pair, self.max_response_length) for name, pair in pairs}

    def operations(self, batch: DataProto) -> float:
        """Floating point operations that the updates on `batch` cannot do without, attention and recomputation left
        out: per weight and token (in the head token of a response, in the tower patch) 2 in forward, 2 for the gradient
        of activations and 2 for that of the weight, where it is trained. A frozen tower has no backward."""
        inner = self.policy.inner
        tower, head = family_of(inner.config).tower(inner), inner.lm_head.weight
        of_tower = list(tower.parameters()) if tower is not None else []
        others = {id(weight) for weight in (*of_tower, head, inner.get_input_embeddings().weight)}
        per_token = sum((6 if w.requires_grad else 4) * w.numel() for w in inner.parameters() if id(w) not in others)
        per_patch = sum((6 if w.requires_grad else 2) * w.numel() for w in of_tower)
        work = Work(batch, [ORIGINAL, *self.requirements.live_views], per_patch / per_token)
        in_head = (6 if head.requires_grad else 4) * head.numel() * sum(work.responses)
        return float(per_token * work.tokens(range(len(batch))) + in_head) * self.config.ppo_epochs

    def _backward(
        self,
        rows: DataProto,
        denominators: dict[str, Denominators],
        metrics: MetricBag,
        coefs: Mapping[str, float],
        first: bool,
    ) -> None:
        """Forward, losses and backward of one micro-batch; gradients add up in the parameters."""
        views = [ORIGINAL, *self.requirements.live_views]
        live = forward_views(self.policy, rows, views, self.device, self.requirements.exact)
        self._keep(rows, live)
        stored = {name: rows[name].to(self.device) for name in self.requirements.stored if name in rows}
        mask = stored["response_mask"]
        if "old_log_probs" not in stored:
            from_rollout = self.old_log_probs == OldLogProbs.rollout
            stored["old_log_probs"] = stored["rollout_log_probs"] if from_rollout else live["log_probs"].detach()
            if first:
                add_mismatch(metrics, live["log_probs"].detach(), stored["rollout_log_probs"], mask)
        elif first:
            # Nothing has been updated yet: whatever differs here is numerics, and should be almost 0.
            difference = (live["log_probs"].detach() - stored["old_log_probs"])[mask.bool()]
            metrics.add_max("actor/first_log_ratio_max", difference.abs().max().item() if len(difference) else 0.0)
        average = self.config.loss_avg_mode
        # Leaves of their own: FSDP gathers the weights whenever a gradient reaches what its forward returned, here once
        # for each term, and not on a rank whose rows a term leaves out.
        leaves = {name: column.detach().requires_grad_() for name, column in live.items()}
        losses = compute_losses(self.terms, {**stored, **leaves}, mask, average, denominators, metrics, coefs)
        gradients = self._gradients_by_term(losses, leaves, mask, denominators[ALL], metrics)
        # FSDP averages over ranks; the denominators are global already, so the shares must be summed.
        torch.autograd.backward(list(live.values()), [g * dist.get_world_size() for g in gradients])
        self.step.widen_gradients()

    def _keep(self, rows: DataProto, live: dict[str, torch.Tensor]) -> None:
        """Keep the columns of the rows to be shown, of the first epoch."""
        for place, number in enumerate(rows["row"].tolist() if self.show and "row" in rows else ()):
            if number < self.show and number not in self.shown and rows["response_mask"][place].any():
                self.shown[number] = {name: column[place].detach().float().cpu() for name, column in live.items()}

    def _gradients_by_term(
        self,
        losses: dict[str, torch.Tensor],
        live: dict[str, torch.Tensor],
        mask: torch.Tensor,
        denominators: Denominators,
        metrics: MetricBag,
    ) -> list[torch.Tensor]:
        """d loss / d log-probs [B, R] of each live column, summed over terms; term by term to see who does what.

        Terms are functions of the log-probs alone, so this costs a few operations per token. It shows how hard
        each term pulls on a token (`actor/grad_per_token/<term>`: mean |d loss / d log-prob|, times the tokens of the
        mini-batch), and lays a gradient that is not finite at a term's door before it reaches the weights.
        """
        totals = [torch.zeros_like(column) for column in live.values()]
        for name, loss in losses.items():
            if not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, list(live.values()), retain_graph=True, allow_unused=True)
            parts = [
                torch.zeros_like(total) if part is None else part for total, part in zip(totals, found, strict=True)
            ]
            pull = sum(part.abs() for part in parts)
            if not torch.isfinite(pull).all() or not torch.isfinite(loss):
                self.nonfinite_terms.add(name)
            metrics.add_tokens(f"actor/grad_per_token/{name}", pull * denominators.tokens, mask)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        return totals
