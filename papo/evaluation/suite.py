"""Suites: which data sets a model is evaluated on. A suite is a YAML file, those of configs/suites by their names:

settings:                       # config keys for all sets, as `papo keys` lists them
  data.max_response_length: 2048
sets:
  geometry:
    data: geometry.parquet      # as data.val_files: a file, a folder, or a hub name
    rows: 601                   # expected; another number is refused
    group: general              # averages are made of groups
    settings: {data.answer_key: solution}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from papo.evaluation.conversations import write_rows
from verl.config.compose import CONFIG_DIR, compose_config
from verl.config.config import Config
from verl.config.keys import nearest
from verl.workers.rollout.base import validation_sampling

SUITES = Path(CONFIG_DIR) / "suites"
ENDINGS = (".parquet", ".json", ".jsonl", ".arrow", "")  # "": a folder
# As PAPO-Eval samples, sees and grades (github.com/xhguo7/PAPO-Eval). Its rule takes the content of the last box and
# asks mathruler.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "suite": {},
    "papo-eval": {
        "worker.rollout.val_override_config.temperature": 1.0,
        "worker.rollout.val_override_config.top_p": 1.0,
        "worker.rollout.val_override_config.top_k": 50,
        "data.max_response_length": 2048,
        "data.min_pixels": 32 * 32,
        "data.max_pixels": 768 * 768,
        "worker.reward.reward_function": "examples/reward_function/math.py:compute_score",
    },
}
# What `train` takes from the run's own config.
AS_TRAINED = (
    *("data.format_prompt", "data.max_prompt_length", "data.max_response_length", "data.min_pixels", "data.max_pixels"),
    *("worker.reward.reward_function", "worker.rollout.val_override_config.temperature", "worker.rollout.temperature"),
    *("worker.rollout.val_override_config.top_p", "worker.rollout.top_p", "worker.rollout.top_k"),
    "worker.rollout.val_override_config.top_k",
)


@dataclass(frozen=True)
class DataSet:
    """A data set of a suite; `settings` are config keys and their values, those of the suite included."""

    name: str
    data: str | None
    rows: int | None = None
    group: str | None = None
    messages: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def check_rows(self, found: int) -> None:
        """Raise ValueError where the data set has another number of rows than expected."""
        if self.rows is not None and found != self.rows:
            raise ValueError(f"{self.data} has {found} rows, and the suite expects {self.rows}")


@dataclass(frozen=True)
class Suite:
    name: str
    sets: tuple[DataSet, ...]

    def within(self, folder: Path) -> Suite:
        """The suite with those sets that have a file in `folder`, by their names, read from there. Raises
        FileNotFoundError where none has."""
        found = []
        for one in self.sets:
            path = next(filter(Path.exists, (folder / f"{one.name}{ending}" for ending in ENDINGS)), None)
            found.append(one if path is None else replace(one, data=str(path)))
        if tuple(found) == self.sets:
            wanted = ", ".join(f"{one.name}{ENDINGS[0]}" for one in self.sets)
            raise FileNotFoundError(f"--data {folder} has no file of suite '{self.name}', such as {wanted}")
        return replace(self, sets=tuple(found))

    def with_rows(self, folder: Path) -> Suite:
        """The suite with conversations turned into rows of problems and answers, in files in `folder`."""
        found = []
        for one in self.sets:
            if one.data is None:
                raise ValueError(
                    f"set '{one.name}': suite '{self.name}' does not say where it lies: give --data FOLDER"
                )
            if one.messages is not None:
                path = folder / f"{one.name}.parquet"
                with naming(one):
                    write_rows(one.data, one.messages, path)
                one = replace(one, data=str(path))
            found.append(one)
        return replace(self, sets=tuple(found))

    def groups(self) -> dict[str, list[str]]:
        """The names of the sets in each group, in order."""
        found: dict[str, list[str]] = {}
        for one in self.sets:
            if one.group is not None:
                found.setdefault(one.group, []).append(one.name)
        return found


def config_of(data_set: DataSet, overrides: Sequence[str]) -> Config:
    """The config of a validation on `data_set`. Raises ValueError naming what is at fault."""
    own = ["trainer.val_only=true", "trainer.logger=[]", f"data.val_files={quoted(data_set.data)}"]
    own += ["data.filter_overlong_prompts=false"]  # a benchmark without some of its questions is another one
    own += [f"trainer.n_gpus_per_node={max(1, torch.cuda.device_count())}"]
    config = compose_config("grpo", [*own, *as_overrides(data_set.settings), *overrides])
    for view, settings in config.algorithm.views.items():
        if settings.column:
            raise ValueError(
                f"--views {view}: it reads pictures of a column '{settings.column}': suites have none such"
            )
    return config


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """Config keys and values as Hydra's overrides; a dict adds to the one that there is."""
    return [
        f"++{key}.{name}={quoted(each)}" if isinstance(value, dict) else f"{key}={quoted(value)}"
        for key, value in settings.items()
        for name, each in (value.items() if isinstance(value, dict) else [("", None)])
    ]


def quoted(value: Any) -> str:
    """`value` as Hydra reads it on a command line."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    return "null" if value is None else str(value).lower()


def sampling_of(config: Config) -> dict[str, Any]:
    """Sampling of a validation, in the words of OpenAI's interface."""
    (sampling,) = validation_sampling(config.worker.rollout, config.data.max_response_length, [""])
    return {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}


@contextmanager
def naming(data_set: DataSet) -> Iterator[None]:
    """Errors of the config and of files name the data set."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"set '{data_set.name}': {error}") from error


def load_suite(reference: str) -> Suite:
    """The suite in a YAML file, or in configs/suites by its name. Raises ValueError or FileNotFoundError naming what is
    at fault."""
    path = Path(reference)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(file.stem for file in SUITES.glob("*.yaml"))
        if reference not in known:
            raise ValueError(f"there is no suite '{reference}': {nearest(reference, known)}, or give a FILE.yaml")
        path = SUITES / f"{reference}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--suite {os.path.abspath(path)}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    where = f"suite {path}"
    _only(content, where, required=("sets",), optional=("settings",))
    shared = content.get("settings") or {}
    if not isinstance(content["sets"], dict) or not content["sets"]:
        raise ValueError(f"{where}: 'sets' has to name at least one data set")
    sets = [_data_set(name, found, shared, f"{where}, set '{name}'") for name, found in content["sets"].items()]
    return Suite(path.stem, tuple(sets))


def _data_set(name: str, content: Any, shared: dict[str, Any], where: str) -> DataSet:
    _only(content, where, required=("data",), optional=("rows", "group", "messages", "settings"))
    settings = {**shared, **(content.get("settings") or {})}
    return DataSet(str(name), **{**content, "settings": settings})


def _only(content: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys {', '.join(required + optional)}, found {content!r}")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{where} has no key '{missing[0]}'")
    for key in content:
        if key not in required + optional:
            raise ValueError(f"{where}: there is no key '{key}': {nearest(key, [*required, *optional])}")
