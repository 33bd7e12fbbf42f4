"""A training worker's part of a checkpoint: shards, optimizer, counts, random numbers.

`<checkpoint>/<role>/` holds the tensors of all ranks (verl/checkpoint/tensors.py) and `rank_<r>.pt` of each.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from verl.checkpoint.files import FileEntry, files_in, load_plain, save_plain, seal
from verl.checkpoint.tensors import INDEX, MODEL, OPTIMIZER, Saved, read_tensors, saved_tensors, write_tensors
from verl.utils.rng import rng_state, set_rng_state
from verl.workers.training.guarded_step import GuardedStep

logger = logging.getLogger(__name__)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight and persistent buffer of a model, by name; a tied weight once."""
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {MODEL + name: tensor.detach() for name, tensor in (*model.named_parameters(), *buffers.items())}


def optimizer_tensors(step: GuardedStep) -> dict[str, torch.Tensor]:
    """The optimizer's state of each weight, under `optimizer.<key>.<weight>`. Raises TypeError for one that is no
    tensor: nothing else is saved, and to lose it would be to resume another run."""
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    found = {}
    for parameter, state in step.optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{type(step.optimizer).__name__} keeps '{key}' as {type(value).__name__}")
            found[f"{OPTIMIZER}{key}.{names[parameter]}"] = value
    return found


def plain_state(step: GuardedStep) -> dict[str, Any]:
    """State besides the model's tensors: the number of updates (the schedule's position), how many of the last
    were skipped, the kind of optimizer, and this rank's random numbers."""
    return {
        "updates": step.schedule.last_epoch,
        "skipped_in_a_row": step.skipped_in_a_row,
        "optimizer": type(step.optimizer).__name__,
        "rng": rng_state(),
    }


class StateWriter:
    """Writes one rank's part, in step with the other ranks'; in the background it goes on from a copy on the CPU."""

    def __init__(self) -> None:
        # Its own group: what a thread sends must not mix with what training sends meanwhile.
        self.group = dist.new_group(backend="gloo")
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.running: Future[dict[str, FileEntry]] | None = None

    def start(
        self,
        folder: str,
        tensors: Mapping[str, torch.Tensor],
        plain: dict[str, Any],
        describe: Callable[[str], None] | None,
        background: bool,
    ) -> None:
        """Begin to write `tensors`, and this rank's `plain` values; rank 0 also lets `describe` write into `folder`.

        Raises RuntimeError while an earlier save is still running.
        """
        if self.running is not None:
            raise RuntimeError("a save is still running: finish it first")
        if background:
            stager = DefaultStager(StagingOptions(False, False, False, False))
            tensors = stager.stage(dict(tensors))
            stager.close()
        self.running = self.pool.submit(self._write, folder, tensors, plain, describe)
        if not background:
            wait([self.running])

    def done(self) -> bool:
        return self.running is None or self.running.done()

    def finish(self) -> dict[str, FileEntry]:
        """Wait for the end; returns this rank's files. Raises SaveFailed or OSError."""
        running, self.running = self.running, None
        return running.result() if running is not None else {}

    def _write(
        self,
        folder: str,
        tensors: Mapping[str, torch.Tensor],
        plain: dict[str, Any],
        describe: Callable[[str], None] | None,
    ) -> dict[str, FileEntry]:
        rank = dist.get_rank()
        write_tensors(folder, tensors, self.group)  # first: here all ranks learn of each other's failure
        own = f"rank_{rank}.pt"
        save_plain(os.path.join(folder, own), plain)
        if rank == 0 and describe is not None:
            describe(folder)
        # Files of other ranks begin with __r_ or are being written now.
        mine = [n for n in files_in(folder) if n == own or n.startswith(f"__{rank}_") or (rank == 0 and _of_first(n))]
        return seal(folder, mine)


def _of_first(name: str) -> bool:
    return name == INDEX or os.path.dirname(name) != ""


def load_state(folder: str, step: GuardedStep, rank: int) -> None:
    """Fill model, optimizer and schedule from a role's folder, with as many ranks as there are now; go on with the
    random numbers of `rank`, where it was there. All ranks call this together.

    Raises ValueError for a checkpoint of another model or optimizer, and BrokenCheckpoint for a broken one.
    """
    own = os.path.join(folder, f"rank_{rank}.pt")
    known = load_plain(own if os.path.isfile(own) else os.path.join(folder, "rank_0.pt"))
    if known["optimizer"] != type(step.optimizer).__name__:
        raise ValueError(
            f"{folder} has states of the optimizer {known['optimizer']}, and this run's is "
            f"{type(step.optimizer).__name__} (worker.{step.role}.optim): begin anew with trainer.resume=never"
        )
    saved = saved_tensors(folder)
    targets = model_tensors(step.model)
    _check_model(folder, step.role, saved, targets)
    states = _empty_states(folder, saved, step)
    for parameter_name, state in states.items():
        targets |= {f"{OPTIMIZER}{key}.{parameter_name}": value for key, value in state.items()}
    read_tensors(folder, targets)
    parameters = dict(step.model.named_parameters())
    for name, state in states.items():
        step.optimizer.state[parameters[name]] = state
    step.skipped_in_a_row = known["skipped_in_a_row"]
    set_updates(step, known["updates"])
    if os.path.isfile(own):
        set_rng_state(known["rng"])


def set_updates(step: GuardedStep, updates: int) -> None:
    """Put the schedule behind `updates` updates, with the learning rates that today's config gives there."""
    schedule = step.schedule
    schedule.last_epoch = updates
    rates = [rate * factor(updates) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _check_model(folder: str, role: str, saved: Mapping[str, Saved], targets: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming a weight, where the checkpoint is of another model."""
    weights = {name for name in saved if name.startswith(MODEL)}
    if different := sorted(weights ^ targets.keys()):
        where = "the checkpoint lacks" if different[0] in targets else "this run's model lacks"
        raise ValueError(f"{folder} is of another model (worker.{role}.model.model_path): {where} '{different[0]}'")
    for name, target in targets.items():
        found = (tuple(saved[name].shape), saved[name].dtype)
        if found != (tuple(target.shape), target.dtype):
            raise ValueError(
                f"{folder} is of another model (worker.{role}.model.model_path): '{name}' is {found[0]} {found[1]} "
                f"there, {tuple(target.shape)} {target.dtype} in this run"
            )


def _empty_states(folder: str, saved: Mapping[str, Saved], step: GuardedStep) -> dict[str, dict[str, torch.Tensor]]:
    """For each weight the tensors that its optimizer state will be read into, sharded as the weight is."""
    parameters = dict(step.model.named_parameters())
    groups = {parameter: group for group in step.optimizer.param_groups for parameter in group["params"]}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in saved.items():
        if not name.startswith(OPTIMIZER):
            continue
        key, weight = name.removeprefix(OPTIMIZER).split(".", 1)
        parameter = parameters.get(weight)
        if parameter is None or parameter not in groups:
            raise ValueError(f"{folder} has an optimizer state of '{weight}', which this run does not train")
        if entry.shape == parameter.shape:
            value = torch.zeros_like(parameter, dtype=entry.dtype, requires_grad=False)
        else:  # a count of updates; on a GPU only where the optimizer reads it there
            group = groups[parameter]
            on_device = group.get("fused") or group.get("capturable")
            value = torch.zeros(entry.shape, dtype=entry.dtype, device=parameter.device if on_device else "cpu")
        states.setdefault(weight, {})[key] = value
    return states
