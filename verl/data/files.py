"""Opening what `data.train_files` and `data.val_files` name."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from datasets import Dataset, Image, List, concatenate_datasets, load_dataset

LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Rows:
    """All rows of a run's files, and where each came from."""

    dataset: Dataset
    sources: tuple[tuple[str, int], ...]  # (file or hub name, number of rows), in order

    def origin(self, index: int) -> tuple[str, int]:
        """(file or hub name, row within it) of the row `index`."""
        for name, num_rows in self.sources:
            if index < num_rows:
                return name, index
            index -= num_rows
        raise IndexError(index)


def open_rows(reference: str, key: str, *image_keys: str) -> Rows:
    """Open comma-separated files, folders and hub names, each optionally with `@split`.

    Images stay undecoded. Raises ValueError or FileNotFoundError that names the config `key` and the part at
    fault.
    """
    names, parts = [], []
    for part in filter(None, (p.strip() for p in reference.split(","))):
        for name, dataset in _open_one(part, key):
            if not len(dataset):
                raise ValueError(f"{key}: '{name}' has no rows")
            names.append((name, len(dataset)))
            for image_key in image_keys:
                dataset = _undecoded(dataset, image_key)
            parts.append(dataset)
    if not parts:
        raise ValueError(f"{key}='{reference}' names no file")
    try:
        dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"{key}: the files {[n for n, _ in names]} have columns that do not fit: {error}") from error
    return Rows(dataset, tuple(names))


def _open_one(reference: str, key: str) -> list[tuple[str, Dataset]]:
    path, _, split = reference.partition("@")
    split = split or "train"
    if os.path.isfile(path):
        return [(path, _load_file(path, key))]
    if os.path.isdir(path):
        files = sorted(f for f in glob.glob(os.path.join(path, "**", "*"), recursive=True) if _suffix(f) in LOADERS)
        if "@" in reference:
            files = [f for f in files if os.path.basename(f).startswith(split)]
        if not files:
            raise FileNotFoundError(f"{key}: the folder '{path}' has no {', '.join(LOADERS)} file ('{reference}')")
        return [(file, _load_file(file, key)) for file in files]
    if _suffix(path) in LOADERS or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"{key}: there is no file or folder '{os.path.abspath(path)}'")
    try:
        return [(path, load_dataset(path, split=split))]
    except Exception as error:
        raise ValueError(
            f"{key}='{reference}' is no file or folder here, and as a name on the hub it does not load: {error}"
        ) from error


def _load_file(path: str, key: str) -> Dataset:
    loader = LOADERS.get(_suffix(path))
    if loader is None:
        raise ValueError(f"{key}: '{path}' is none of {', '.join(LOADERS)}")
    try:
        return load_dataset(loader, data_files=path, split="train")
    except Exception as error:
        # datasets wraps the reason ("An error occurred while generating"); the cause is what helps.
        raise ValueError(f"{key}: '{path}' cannot be read as {loader}: {error.__cause__ or error}") from error


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _undecoded(dataset: Dataset, image_key: str) -> Dataset:
    """Hub datasets decode images on access; checks and filters want rows without that cost."""
    feature = dataset.features.get(image_key)
    if isinstance(feature, Image):
        return dataset.cast_column(image_key, Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return dataset.cast_column(image_key, List(Image(decode=False)))
    return dataset
