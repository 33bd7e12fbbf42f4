"""Opening what `data.train_files` and `data.val_files` name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from datasets import Dataset, load_dataset, load_from_disk

from verl.data.splits import split_files

logger = logging.getLogger(__name__)

LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes, of one split and of several
WEIGHTED = re.compile(r"(.+)\*(\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """A file or a name on the hub. In an epoch each row comes `weight` times, on average; `identity` changes when the
    content does."""

    name: str
    num_rows: int
    weight: float
    identity: str


@dataclass(frozen=True)
class Rows:
    """Rows of a run's files, each with its origin."""

    dataset: Dataset
    sources: tuple[Source, ...]  # in order

    def origin(self, index: int) -> tuple[str, int]:
        """(file or hub name, row within it) of the row `index`."""
        for source in self.sources:
            if index < source.num_rows:
                return source.name, index
            index -= source.num_rows
        raise IndexError(index)


def open_rows(reference: str, key: str, required: Mapping[str, str], optional: Sequence[str] = ()) -> Rows:
    """Open comma-separated files, folders and hub names, each optionally with `@split` and `*weight`.

    Of a folder and of a dataset on the hub, `@split` is read, by default `train`: a folder is read as its name on the
    hub would be. Only the columns that are named are kept; a file without an `optional` one has none of it. Images stay
    undecoded.

    Args:
        required: of each column that every file must have, what asks for it, for errors.

    Raises:
        ValueError, FileNotFoundError: naming the config `key` and the part at fault.
    """
    sources, tables = [], []
    for part in filter(None, (p.strip() for p in reference.split(","))):
        found = WEIGHTED.fullmatch(part)
        weight = float(found[2]) if found else 1.0
        if not weight:
            raise ValueError(f"{key}: '{part}' has the weight 0; leave it out")
        for source, dataset in _open_one(found[1] if found else part, key):
            if any(os.path.realpath(source.name) == os.path.realpath(other.name) for other in sources):
                raise ValueError(
                    f"{key}: '{source.name}' is named twice, and its rows would get the same responses twice: "
                    f"'{source.name}*2' gives each row two sets of its own"
                )
            if not len(dataset):
                raise ValueError(f"{key}: '{source.name}' has no rows")
            sources.append(replace(source, weight=weight))
            tables.append(_table(dataset, source.name, key, required, optional))
    if not tables:
        raise ValueError(f"{key}='{reference}' names no file")
    try:
        table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = [source.name for source in sources]
        raise ValueError(f"{key}: the files {names} have columns that do not fit: {error}") from error
    return Rows(Dataset(table, fingerprint="rows"), tuple(sources))


def _table(dataset: Dataset, name: str, key: str, required: Mapping[str, str], optional: Sequence[str]) -> pa.Table:
    """The wanted columns as they lie on disk. Types of `datasets` would decode images on access, and would keep a file
    with them from being joined to one without."""
    columns = dataset.column_names
    for column, asked in required.items():
        if column not in columns:
            raise ValueError(f"{key}: no column '{column}' ({asked}) in {name}; columns: {columns}")
    wanted = [*required, *(column for column in optional if column in columns and column not in required)]
    table = dataset.with_format("arrow")[:].select(wanted).replace_schema_metadata(None)
    for at, column in enumerate(wanted):  # an answer 7 here and "B" there
        if pa.types.is_integer(table.schema.field(column).type):
            table = table.set_column(at, column, table.column(column).cast(pa.string()))
    return table


def _open_one(reference: str, key: str) -> list[tuple[Source, Dataset]]:
    path, _, split = reference.partition("@")
    split = split or "train"
    if os.path.isfile(path):
        if split != "train":
            raise ValueError(f"{key}: '{reference}' asks for a split of a file, which has none")
        return [_open_file(path, key)]
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, name)) for name in SAVED):
            return [_from_hub_or_disk(path, split, key, reference)]
        return [_open_file(file, key) for file in _files_of(path, split, key, reference)]
    if _suffix(path) in LOADERS or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"{key}: there is no file or folder '{os.path.abspath(path)}'")
    return [_from_hub_or_disk(path, split, key, reference)]


def _files_of(folder: str, split: str, key: str, reference: str) -> list[str]:
    try:
        splits = split_files(folder, list(LOADERS))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{key}='{reference}': {error}") from error
    if not splits:
        raise FileNotFoundError(f"{key}: the folder '{folder}' has no {', '.join(LOADERS)} file ('{reference}')")
    if split not in splits:
        known = ", ".join(f"{name} ({len(files)} file(s))" for name, files in splits.items())
        raise ValueError(
            f"{key}: the folder '{folder}' has no split '{split}' ('{reference}'); it has {known}: write "
            f"{folder}@{next(iter(splits))}, or name the files"
        )
    names = ", ".join(os.path.relpath(file, folder) for file in splits[split])
    others = ", ".join(name for name in splits if name != split)
    logger.info("%s: split '%s' of %s is %s%s", key, split, folder, names, f" (others: {others})" if others else "")
    return splits[split]


def _from_hub_or_disk(path: str, split: str, key: str, reference: str) -> tuple[Source, Dataset]:
    try:
        if os.path.isdir(path):
            dataset = load_from_disk(path)
            dataset = dataset if isinstance(dataset, Dataset) else dataset[split]
        else:
            dataset = load_dataset(path, split=split)
    except Exception as error:
        raise ValueError(
            f"{key}='{reference}' is no file or folder here, and as a name on the hub it does not load: {error}"
            if not os.path.isdir(path)
            else f"{key}: the folder '{reference}', which `save_to_disk` has written, does not load: {error}"
        ) from error
    name = path if split == "train" else f"{path}@{split}"  # it is part of its rows' names: splits must differ
    return Source(name, len(dataset), 1.0, dataset._fingerprint), dataset


def _open_file(path: str, key: str) -> tuple[Source, Dataset]:
    loader = LOADERS.get(_suffix(path))
    if loader is None:
        raise ValueError(f"{key}: '{path}' is none of {', '.join(LOADERS)}")
    try:
        dataset = load_dataset(loader, data_files=path, split="train")
    except Exception as error:
        # datasets wraps the reason ("An error occurred while generating"); the cause is what helps.
        raise ValueError(f"{key}: '{path}' cannot be read as {loader}: {error.__cause__ or error}") from error
    state = os.stat(path)
    identity = f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"
    return Source(path, len(dataset), 1.0, identity), dataset


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
