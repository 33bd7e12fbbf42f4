"""Sharded tensors in a folder of torch's distributed checkpoint format (DCP), read without trusting the folder.

A folder holds tensors alone: torch would unpickle anything else, and its index file, without restriction.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.futures import Future

from verl.checkpoint.files import BrokenCheckpoint, first_line, verify

INDEX = ".metadata"
MODEL, OPTIMIZER = "model.", "optimizer."

# Everything that the index of a folder of tensors is made of.
ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "StorageMeta",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


class SaveFailed(RuntimeError):
    """Not everything could be written; the message says by which rank and why."""


class IndexUnpickler(pickle.Unpickler):
    """Makes an index's own classes and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of tensors does")


class SafeReader(FileSystemReader):
    """Reads tensors and refuses everything else. Raises BrokenCheckpoint naming the file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = os.path.join(self.path, INDEX)
        try:
            with open(path, "rb") as file:
                metadata = IndexUnpickler(file).load()
            others = [n for n, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
            files = {info.relative_path for info in metadata.storage_data.values()}
        except Exception as error:  # an unpickler raises whatever the bytes make it raise
            raise BrokenCheckpoint(f"{path} cannot be read: {first_line(error)}") from error
        if others or any(os.path.basename(name) != name for name in files):
            raise BrokenCheckpoint(f"{path} does not describe tensors in its own folder alone")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        self.reading = sinfo.relative_path
        return super()._slice_file(file, sinfo)

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        self.reading = ""
        try:
            return super().read_data(plan, planner)
        except Exception as error:
            path = os.path.join(self.path, self.reading)
            raise BrokenCheckpoint(f"{path} cannot be read: {first_line(error)}") from error


class Writer(FileSystemWriter):
    """Raises the operating system's own error where torch would hide it behind one of its file format."""

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


@dataclass(frozen=True)
class Saved:
    """The entry of a tensor in an index."""

    shape: torch.Size
    dtype: torch.dtype


def saved_tensors(folder: str) -> dict[str, Saved]:
    """The tensors in a folder, by name. Raises BrokenCheckpoint."""
    found = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: Saved(entry.size, entry.properties.dtype) for name, entry in found.items()}


def write_tensors(folder: str, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors, sharded or whole, into a folder; all ranks of `group` call this together.

    Rank r writes the files that begin with `__r_`, rank 0 the index too. Raises SaveFailed on every rank.
    """
    if others := [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]:
        raise TypeError(f"{others} are no tensors")
    try:
        dcp.save(dict(tensors), storage_writer=Writer(folder), process_group=group)
    except CheckpointException as error:
        raise SaveFailed(_by_rank(error)) from error


def read_tensors(folder: str, tensors: Mapping[str, torch.Tensor], alone: bool = False) -> None:
    """Fill tensors, sharded in any way, with those of their names; all ranks call this together, unless `alone`.

    Raises BrokenCheckpoint.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so `alone` says
            dcp.load(dict(tensors), storage_reader=SafeReader(folder), no_dist=alone)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        broken = next((cause for cause in causes if isinstance(cause, BrokenCheckpoint)), None)
        raise broken or BrokenCheckpoint(f"{folder} cannot be read: {_by_rank(error)}") from error


def load_full_model(folder: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint's `actor` folder on CPU, under the names of the transformers model's state dict, in
    the dtype they were saved in; a tied weight once, under its first name. For one process without a process group.

    Raises BrokenCheckpoint where a file is missing or damaged.
    """
    folder = os.path.abspath(folder)
    verify(os.path.dirname(folder), os.path.basename(folder) + "/")
    found = saved_tensors(folder)
    weights = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in found.items() if name.startswith(MODEL)}
    read_tensors(folder, weights, alone=True)
    return {name.removeprefix(f"{MODEL}inner."): weight for name, weight in weights.items()}


def _by_rank(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {first_line(cause)}" for rank, (cause, _) in error.failures.items())
