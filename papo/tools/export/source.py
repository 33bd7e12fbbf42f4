"""The checkpoint that a path means, and what it holds besides its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verl.checkpoint.files import MANIFEST, BrokenCheckpoint, read_manifest
from verl.checkpoint.folder import CheckpointFolder

if TYPE_CHECKING:  # torch takes seconds, `papo --help` should not
    import torch

CHECKPOINTS, ACTOR, HUGGINGFACE = "checkpoints", "actor", "huggingface"
BEST = "val/accuracy"


@dataclass(frozen=True)
class Source:
    """A checkpoint of a policy.

    Attributes:
        actor: The folder with the weights' shards and, in `huggingface`, all of a Hugging Face folder but weights.
        easyr1: Whether it is one of EasyR1's.
        config: The settings of the run, {} where nobody kept them.
        metrics: What was logged up to the checkpoint's step, by step.
    """

    actor: str
    easyr1: bool
    step: int | None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def huggingface(self) -> str:
        return os.path.join(self.actor, HUGGINGFACE)

    @property
    def has_adapter(self) -> bool:
        """Whether the run trained LoRA, as far as its settings say."""
        return bool(self.config.get("worker", {}).get("actor", {}).get("model", {}).get("lora", {}).get("rank"))

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights, on CPU. Raises BrokenCheckpoint naming the file that is at fault."""
        from verl.checkpoint.tensors import load_full_model
        from verl.legacy.shards import merge_shards

        return merge_shards(self.actor, dtype) if self.easyr1 else load_full_model(self.actor)


def find_source(path: str, best: str | None = None) -> Source:
    """The checkpoint that `path` means: a run's folder, a checkpoint or its folder `actor`, of this framework or of
    EasyR1.

    Args:
        best: In a run's folder take the checkpoint of the step where this metric was highest (""; the run's own
            trainer.save_best, or val/accuracy), not the latest.

    Raises FileNotFoundError or ValueError saying what is there and what is missing.
    """
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"'{path}' is no folder: give a run, a checkpoint (global_step_<N>) or its actor folder"
        )
    if os.path.isdir(os.path.join(path, CHECKPOINTS)):
        path = _checkpoint_of(path, best)
    elif best is not None:
        raise ValueError(f"--best chooses among the checkpoints of a run, and '{path}' has no folder {CHECKPOINTS}")
    actor = os.path.join(path, ACTOR) if os.path.isdir(os.path.join(path, ACTOR)) else path
    source = _easyr1(actor) if _has_rank_files(actor) else _ours(actor)
    if not os.path.isfile(os.path.join(source.huggingface, "config.json")):
        raise FileNotFoundError(
            f"'{source.huggingface}' has no config.json: put config and tokenizer of the model there that was trained"
        )
    return source


def _has_rank_files(actor: str) -> bool:
    from verl.legacy.shards import RANK_FILE

    return any(RANK_FILE.fullmatch(name) for name in os.listdir(actor))


def _easyr1(actor: str) -> Source:
    _, _, step = os.path.basename(os.path.dirname(actor)).partition("global_step_")
    return Source(actor, True, int(step) if step.isdecimal() else None)


def _ours(actor: str) -> Source:
    checkpoint = os.path.dirname(actor)
    if not os.path.isfile(os.path.join(checkpoint, MANIFEST)):
        hint = "its folder model/ is a Hugging Face folder already" if os.path.isdir(f"{actor}/model") else ""
        raise BrokenCheckpoint(
            f"'{actor}' holds no checkpoint: there is neither {CHECKPOINTS}/, nor {ACTOR}/ beside a {MANIFEST}, nor "
            f"model_world_size_<W>_rank_<R>.pt{'; ' + hint if hint else ''}"
        )
    manifest = read_manifest(checkpoint)
    run = os.path.dirname(os.path.dirname(checkpoint))
    metrics = [line for line in read_metrics(run) if line["step"] <= manifest["step"]]
    return Source(actor, False, manifest["step"], manifest.get("config") or {}, metrics)


def _checkpoint_of(run: str, best: str | None) -> str:
    folder = CheckpointFolder(os.path.join(run, CHECKPOINTS))
    if best is None:
        latest = folder.latest()
        if latest is None:
            raise BrokenCheckpoint(f"'{folder.path}' has no file latest: no checkpoint of this run was finished")
        return latest
    steps = folder.steps()
    if not steps:
        raise BrokenCheckpoint(f"'{folder.path}' has no checkpoint")
    if not best:
        best = (read_manifest(folder.checkpoint(steps[0])).get("config") or {}).get("trainer", {}).get("save_best")
        best = best or BEST
    found = {line["step"]: line[best] for line in read_metrics(run) if line.get(best) is not None}
    candidates = {step: found[step] for step in steps if step in found}
    if not candidates:
        known = ", ".join(sorted({name for line in read_metrics(run) for name in line if name.startswith("val/")}))
        raise ValueError(
            f"--best: none of the steps {', '.join(map(str, steps))} with a checkpoint has {best}; measured are "
            f"{known or 'no val/* at all'}"
        )
    return folder.checkpoint(max(candidates, key=candidates.__getitem__))


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; [] where there is none."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
