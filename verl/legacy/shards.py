"""EasyR1's checkpoints: one file of a model's shards per rank, read in one process and without trusting the files.

`model_world_size_<W>_rank_<R>.pt` is a state dict of DTensors, each rank's with its own shard and how it was cut. They
are loaded with `weights_only=True`, which makes listed classes alone, and of those that say how a tensor was cut it
makes the stand-ins below: neither a process group nor code of torch.distributed is involved.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from verl.checkpoint.files import BrokenCheckpoint, first_line

RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


class _Record:
    """Holds what it was saved with."""

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Spec(_Record):
    """DTensorSpec: `mesh`, `placements`, `tensor_meta`."""


class _Mesh(_Record):
    """DeviceMesh: `_coordinate_on_dim` is the place of the rank that saved it."""


class _Shard(_Record):
    """A placement: cut along `dim`."""


class _Replicate(_Record):
    """A placement: the same on every rank."""


class _Meta(_Record):
    """TensorMeta: the first argument is the whole tensor's shape."""


class _Layout(_Record):
    """Placeholder for unused layout classes."""


class _SavedTensor(torch.Tensor):
    """DTensor: `_local_tensor` and `_spec`."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise NotImplementedError("a stand-in that holds a shard")


# The names under which torch has kept these classes, from 2.4 to 2.13.
_TENSOR, _OLD = "torch.distributed.tensor", "torch.distributed._tensor"
STAND_INS = [
    (_SavedTensor, f"{_TENSOR}.DTensor"),
    (_SavedTensor, f"{_TENSOR}._api.DTensor"),
    (_SavedTensor, f"{_OLD}.api.DTensor"),
    (_Mesh, "torch.distributed.device_mesh.DeviceMesh"),
    (_Mesh, f"{_OLD}.device_mesh.DeviceMesh"),
    (_Layout, "torch.distributed._mesh_layout._MeshLayout"),
    (_Layout, "torch.distributed._mesh_layout._FlatLayout"),
    (_Layout, f"{_TENSOR}._dtensor_spec.ShardOrderEntry"),
    *(
        (kind, f"{where}.{name}")
        for where in (f"{_TENSOR}._dtensor_spec", f"{_OLD}._dtensor_spec", f"{_OLD}.placement_types")
        for kind, name in ((_Spec, "DTensorSpec"), (_Meta, "TensorMeta"))
    ),
    *(
        (kind, f"{where}.placement_types.{name}")
        for where in (_TENSOR, _OLD)
        for kind, name in ((_Shard, "Shard"), (_Replicate, "Replicate"))
    ),
]


@dataclass(frozen=True)
class _Piece:
    """One rank's part of a weight: `place` in the mesh, and a placement for each of its axes."""

    local: torch.Tensor
    place: tuple[int, ...]
    placements: tuple[_Record, ...]
    shape: tuple[int, ...]


def rank_files(folder: str) -> list[str]:
    """The paths of the ranks' files, in order; [] for a folder without any.

    Raises BrokenCheckpoint where one is missing, or where they are of runs with different numbers of ranks.
    """
    found = {match[0]: match for name in os.listdir(folder) if (match := RANK_FILE.fullmatch(name))}
    sizes = sorted({int(match[1]) for match in found.values()})
    if len(sizes) > 1:
        raise BrokenCheckpoint(
            f"{folder} has files of runs with {' and '.join(map(str, sizes))} ranks: leave one run's"
        )
    names = [f"model_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])] if sizes else []
    if missing := [name for name in names if name not in found]:
        raise BrokenCheckpoint(f"{os.path.join(folder, missing[0])} is missing, {len(missing)} of {len(names)} are")
    if others := sorted(found.keys() - names):
        raise BrokenCheckpoint(f"{os.path.join(folder, others[0])} is of no rank among {len(names)}")
    return [os.path.join(folder, name) for name in names]


def merge_shards(folder: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole weights of the ranks' files in `folder`, on CPU, floating ones in `dtype`, by their names there.

    Raises BrokenCheckpoint naming the file that is missing, cut short, of another number of ranks or not to be trusted.
    """
    paths = rank_files(folder)
    if not paths:
        raise BrokenCheckpoint(f"{folder} has no model_world_size_<W>_rank_<R>.pt")
    ranks = [_load(path) for path in paths]
    for path, rank in zip(paths, ranks, strict=True):
        if different := sorted(rank.keys() ^ ranks[0].keys()):
            raise BrokenCheckpoint(f"{path} and {paths[0]} hold different weights: '{different[0]}' is in one of them")
    sharded = any(isinstance(weight, _SavedTensor) for weight in ranks[0].values())
    merged = {}
    for name in ranks[0]:
        weight = _merge(name, [rank[name] for rank in ranks], paths, sharded)
        merged[name] = weight.to(dtype) if weight.is_floating_point() else weight.clone()
    return merged


@contextmanager
def _stand_ins_alone() -> Iterator[None]:
    """torch.load knows the stand-ins, and not the classes that torch.distributed or others have declared safe."""
    others = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(STAND_INS)
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(others)


def _load(path: str) -> dict[str, torch.Tensor]:
    try:
        with _stand_ins_alone():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is none
        reason = str(error).replace("WeightsUnpickler error: ", "").strip()
        unsafe = re.search(r"GLOBAL (\S+)|class (\S+)|function (\S+)", reason)
        if "weights_only" in reason and unsafe:
            held = next(filter(None, unsafe.groups()))
            raise BrokenCheckpoint(f"{path} holds {held}, which no state dict of weights does") from error
        raise BrokenCheckpoint(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(weight, torch.Tensor) for weight in state.values()):
        raise BrokenCheckpoint(f"{path} is no state dict: it holds more than tensors by name")
    return state


def _merge(name: str, weights: list[torch.Tensor], paths: list[str], sharded: bool) -> torch.Tensor:
    """One weight from what each rank has of it."""
    if not isinstance(weights[0], _SavedTensor):
        # Beside DTensors a plain tensor is whole on every rank; without any, each rank has a slice of the first axis.
        return weights[0] if sharded or len(weights) == 1 else torch.cat(weights)
    pieces = [_piece(name, weight, path) for weight, path in zip(weights, paths, strict=True)]
    first = pieces[0]
    mesh = [max(piece.place[axis] for piece in pieces) + 1 for axis in range(len(first.place))]
    parts = {piece.place: piece.local for piece in pieces}
    if len(parts) != len(paths) or torch.Size(mesh).numel() != len(paths):
        raise BrokenCheckpoint(
            f"{paths[-1]} and the others are not of one run of {len(paths)} ranks: '{name}' was cut for a mesh of "
            f"{' x '.join(map(str, mesh))}, of which {len(parts)} places are there"
        )
    # The last axis of a mesh cuts what the axes before it have left.
    for axis in reversed(range(len(mesh))):
        groups = defaultdict(list)
        for place in sorted(parts):
            groups[place[:axis]].append(parts[place])
        cut = first.placements[axis]
        along = cut.dim if isinstance(cut, _Shard) else None
        parts = {place: group[0] if along is None else torch.cat(group, along) for place, group in groups.items()}
    whole = parts[()]
    if tuple(whole.shape) != first.shape:
        raise BrokenCheckpoint(
            f"{paths[0]} and the others of {len(paths)} ranks have {tuple(whole.shape)} of '{name}', which is "
            f"{first.shape}"
        )
    return whole


def _piece(name: str, weight: torch.Tensor, path: str) -> _Piece:
    try:
        spec = weight._spec
        places, shape = tuple(spec.mesh._coordinate_on_dim), tuple(spec.tensor_meta.arguments[0])
        placements = tuple(spec.placements)
        if len(placements) != len(places) or not all(isinstance(p, (_Shard, _Replicate)) for p in placements):
            raise TypeError(f"placements {placements}")
        return _Piece(weight._local_tensor, places, placements, shape)
    except (AttributeError, TypeError, IndexError) as error:
        raise BrokenCheckpoint(f"{path} does not say how '{name}' was cut: {first_line(error)}") from error
