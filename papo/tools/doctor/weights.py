"""A folder's weights, as far as their headers tell: complete, whole, and as many as config.json describes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100 * 2**20  # the format's own limit


@dataclass(frozen=True)
class Weights:
    """`elements` by name of tensor, the `bytes` of all files and how many there are."""

    elements: dict[str, int]
    bytes: int
    files: int


def read_header(path: str) -> dict[str, int]:
    """Number of elements of each tensor in a safetensors file, whose size is checked against what it promises.

    Raises ValueError for a file that is no safetensors file or was cut short.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"'{path}' is no safetensors file, or only the beginning of one ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as reason:
            raise ValueError(f"'{path}' has a header that cannot be read: {reason}") from reason
    header.pop("__metadata__", None)
    promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != promised:
        raise ValueError(f"'{path}' has {size} bytes, and its header promises {promised}: it was cut short or damaged")
    return {name: prod(entry["shape"]) for name, entry in header.items()}


def inspect(folder: str) -> Weights:
    """The weights of a Hugging Face folder.

    Raises:
        FileNotFoundError: no weights, or a file that the index names is missing.
        ValueError: a file is damaged, or has not all that the index places in it.
    """
    placed: dict[str, str] = {}
    if os.path.isfile(os.path.join(folder, INDEX)):
        with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
            placed = json.load(file)["weight_map"]
        names = sorted(set(placed.values()))
    elif os.path.isfile(os.path.join(folder, SINGLE)):
        names = [SINGLE]
    else:
        raise FileNotFoundError(f"'{folder}' has neither {SINGLE} nor {INDEX}")
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise FileNotFoundError(
            f"'{folder}' lacks {len(missing)} of {len(names)} files of weights: {', '.join(missing)}"
        )
    elements: dict[str, int] = {}
    size = 0
    for name in names:
        path = os.path.join(folder, name)
        found = read_header(path)
        absent = [tensor for tensor, place in placed.items() if place == name and tensor not in found]
        if absent:
            raise ValueError(f"'{path}' lacks {len(absent)} tensors that the index places in it, such as {absent[0]}")
        elements |= found
        size += os.path.getsize(path)
    return Weights(elements, size, len(names))
