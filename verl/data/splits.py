"""The files of each split of a dataset folder: the same that its name on the hub gives."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from datasets.data_files import FILES_TO_IGNORE, resolve_pattern, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

# The words by which `datasets` knows a split in the name of a folder or a file, each between these characters.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BETWEEN = "[-._ 0-9]"
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")


def split_files(folder: str, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """{split: paths} of the data files in `folder`, those with one of `suffixes`, in order.

    As for a dataset on the hub, the README's `configs` decide, else the names of the files or of their folders; where
    no name says a split, all files are `train`. Empty without data files.

    Raises:
        ValueError: the README describes several configs, none of them the default, or is not to be read.
    """
    declared = _declared(folder)
    if declared:
        found = {
            split: sorted({path for pattern in patterns for path in resolve_pattern(pattern, base_path=folder)})
            for split, patterns in declared.items()
        }
    else:
        found = _by_name(folder, [path for path in _files(folder) if _is_data(path, suffixes)])
    chosen = {split: [path for path in paths if _is_data(path, suffixes)] for split, paths in found.items()}
    return {split: paths for split, paths in chosen.items() if paths}


def _files(folder: str) -> list[str]:
    return sorted(path for path in glob.glob(os.path.join(folder, "**", "*"), recursive=True) if os.path.isfile(path))


def _is_data(path: str, suffixes: Sequence[str]) -> bool:
    return os.path.splitext(path)[1].lower() in suffixes and os.path.basename(path) not in FILES_TO_IGNORE


def _declared(folder: str) -> dict[str, list[str]]:
    """{split: patterns} of the default config in README.md; empty where it declares none."""
    readme = os.path.join(folder, "README.md")
    if not os.path.isfile(readme):
        return {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme, ignore_metadata_errors=True).data)
    except Exception as error:  # YAML's, the hub's or datasets' own
        raise ValueError(f"{readme} is not to be read as a dataset's card: {error}") from error
    if not configs:
        return {}
    name = configs.get_default_config_name()
    if name is None:
        raise ValueError(f"{readme} has the configs {', '.join(configs)}, none of them the default: name the files")
    files = configs[name].get("data_files")
    if files is None:
        return {}
    inside = configs[name].get("data_dir", "")
    return {str(s): [os.path.join(inside, p) for p in patterns] for s, patterns in sanitize_patterns(files).items()}


def _by_name(folder: str, paths: list[str]) -> dict[str, list[str]]:
    """{split: paths}; by shards (`data/train-00000-of-00002.parquet`), else by folders, else by files."""
    relative = {path: os.path.relpath(path, folder).replace(os.sep, "/") for path in paths}
    for of in (_by_shard, _by_folder, _by_file):
        splits = {path: of(name) for path, name in relative.items()}
        found: dict[str, list[str]] = {}
        for path, split in splits.items():
            if split:
                found.setdefault(split, []).append(path)
        if found:
            return found
    return {"train": paths}


def _by_shard(name: str) -> str | None:
    found = SHARD.fullmatch(name)
    return found[1] if found else None


def _by_folder(name: str) -> str | None:
    return next((split for part in name.split("/")[:-1] if (split := _said(part, "(?:$|" + BETWEEN + ")"))), None)


def _by_file(name: str) -> str | None:
    return _said(name.rpartition("/")[2], BETWEEN)


def _said(text: str, behind: str) -> str | None:
    """The split that one of its words in `text` says."""
    for split, words in WORDS.items():
        if re.search(rf"(?:^|{BETWEEN})(?:{'|'.join(words)}){behind}", text):
            return split
    return None
