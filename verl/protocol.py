"""DataProto: the one batch type that travels between the driver and its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from verl.columns import COLUMNS


@dataclass
class DataProto:
    """Rows of tensors and of Python objects.

    `tensors` holds tensors whose first dimension is the row, `objects` one-dimensional object arrays (texts, uids,
    images). `verl.columns` declares every column.

    Rows that share an object (the n responses of one prompt share their image tensors) go on sharing it when
    the batch is indexed, split, joined or pickled, so images cross Ray once per prompt.
    """

    tensors: dict[str, torch.Tensor]
    objects: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {name: len(column) for name, column in {**self.tensors, **self.objects}.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"columns disagree in their number of rows: {rows}")

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor],
        objects: Mapping[str, Sequence[Any]] | None = None,
    ) -> DataProto:
        """Make a batch; raises ValueError where columns disagree in their number of rows."""
        return cls(dict(tensors), {name: object_array(column) for name, column in (objects or {}).items()})

    def __len__(self) -> int:
        return len(next(iter({**self.tensors, **self.objects}.values()), ()))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.objects

    def __getitem__(self, name: str) -> torch.Tensor | np.ndarray:
        if name in self.objects:
            return self.objects[name]
        if name not in self.tensors:
            raise KeyError(f"no column '{name}'; there are {sorted([*self.tensors, *self.objects])}")
        return self.tensors[name]

    def select(self, names: Sequence[str]) -> DataProto:
        """Only the columns in `names`; a name that the batch lacks is a KeyError."""
        missing = [name for name in names if name not in self]
        if missing:
            raise KeyError(f"no columns {missing}; there are {sorted([*self.tensors, *self.objects])}")
        tensors = {name: self.tensors[name] for name in names if name in self.tensors}
        objects = {name: self.objects[name] for name in names if name in self.objects}
        return DataProto(tensors, objects)

    def rows(self, index: torch.Tensor | slice) -> DataProto:
        """The rows in `index` (integers, booleans or a slice), in that order."""
        array_index = index if isinstance(index, slice) else index.numpy()
        objects = {name: column[array_index] for name, column in self.objects.items()}
        return DataProto({name: column[index] for name, column in self.tensors.items()}, objects)

    def with_columns(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        objects: Mapping[str, Sequence[Any]] | None = None,
    ) -> DataProto:
        """A batch that also has these columns; a column of the same name is replaced."""
        return DataProto.from_dict({**self.tensors, **(tensors or {})}, {**self.objects, **(objects or {})})

    def repeat_interleave(self, times: int) -> DataProto:
        """Each row `times` times, copies side by side."""
        return self.rows(torch.arange(len(self)).repeat_interleave(times))

    def chunk(self, parts: int) -> list[DataProto]:
        """`parts` consecutive pieces of equal size; raises ValueError where that cannot be."""
        if len(self) % parts:
            raise ValueError(f"{len(self)} rows cannot be cut into {parts} equal parts")
        size = len(self) // parts
        return [self.rows(slice(i * size, (i + 1) * size)) for i in range(parts)]

    def split(self, sizes: Sequence[int]) -> list[DataProto]:
        """Consecutive pieces of these sizes; raises ValueError where they do not make up the whole."""
        if sum(sizes) != len(self):
            raise ValueError(f"{len(self)} rows cannot be cut into pieces of {list(sizes)}")
        return [self.rows(slice(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    @staticmethod
    def concat(parts: Sequence[DataProto]) -> DataProto:
        """The rows of all parts, in order; all must have the same columns."""
        if not parts:
            raise ValueError("nothing to concatenate")
        columns = {*parts[0].tensors, *parts[0].objects}
        for part in parts[1:]:
            if (others := {*part.tensors, *part.objects}) != columns:
                raise ValueError(f"parts have different columns: {sorted(columns)} and {sorted(others)}")
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        objects = {name: np.concatenate([part.objects[name] for part in parts]) for name in parts[0].objects}
        return DataProto(tensors, objects)


def object_array(values: Sequence[Any]) -> np.ndarray:
    """A one-dimensional object array. `np.array` would turn lists of equal length into two dimensions."""
    array = np.empty(len(values), dtype=object)
    array[:] = list(values) if not isinstance(values, np.ndarray) else values
    return array


def check_columns(batch: DataProto) -> None:
    """Raise ValueError where a tensor column has another dtype or number of dimensions than declared."""
    for name, tensor in batch.tensors.items():
        declared = COLUMNS.get(name)
        if declared is None:
            continue
        if tensor.dtype != declared.dtype or tensor.dim() != len(declared.shape.split()):
            raise ValueError(
                f"column '{name}' is {tensor.dtype} {tuple(tensor.shape)}, "
                f"and should be {declared.dtype} [{declared.shape}] ({declared.meaning})"
            )
