"""TRL's reward functions in this framework's reward processes, which can be killed.

f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from types import SimpleNamespace
from typing import Any

import cloudpickle

from verl.config.worker import RewardType
from verl.utils.files import atomic_path
from verl.utils.imports import import_file, import_function
from verl.workers.reward.base import RewardInput

logger = logging.getLogger(__name__)

REWARD_TYPE = "batch"
PROMPT, ANSWER = "papo_prompt", "papo_answer"  # columns that papo/api/data.py adds for the trainer
NOT_COLUMNS = ("prompt", "completion", "completion_ids", PROMPT, ANSWER)
Values = list[float | None]


@dataclass
class Part:
    """One of reward_funcs: TRL's callable, or "path/to/file.py:function", which is of this framework's form."""

    name: str
    function: Callable[..., Any] | str
    weight: float
    file: str = ""  # where a function stands, which pickling forgets and its tracebacks name

    def __post_init__(self) -> None:
        if hasattr(self.function, "__code__"):
            self.file = self.function.__code__.co_filename


def save(parts: list[Part], path: str) -> None:
    """Write the functions, closures and all, for the processes that call them."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(sys.path, file)
        cloudpickle.dump(parts, file)


@cache
def load(path: str) -> list[Part]:
    """The functions that `save` wrote, with what they import."""
    with open(path, "rb") as file:
        sys.path += [folder for folder in pickle.load(file) if folder not in sys.path]
        parts: list[Part] = cloudpickle.load(file)
    for part in parts:
        if part.file:
            part.function.__code__ = part.function.__code__.replace(co_filename=part.file)
    return parts


@cache
def _dataset(folder: str) -> Any:
    from datasets import load_from_disk  # with pyarrow: only where a process grades

    return load_from_disk(folder)


async def score(inputs: list[RewardInput], functions: str) -> list[dict[str, float | None]]:
    """`overall`, the weighted sum of what applies to a response, and each function's result by its name. Coroutines run
    at one time.

    Args:
        functions: The file that `save` wrote.
    """
    parts, columns = load(functions), {}
    arguments = arguments_of(inputs, columns, wanted(parts))
    found = [call(part, inputs, arguments, columns) for part in parts]
    places = [place for place, result in enumerate(found) if inspect.isawaitable(result)]
    for place, result in zip(places, await asyncio.gather(*(found[p] for p in places)), strict=True):
        found[place] = result
    results = {part.name: checked(part.name, one, len(inputs)) for part, one in zip(parts, found, strict=True)}
    scores = []
    for row in range(len(inputs)):
        applies = [part.weight * results[part.name][row] for part in parts if results[part.name][row] is not None]
        overall = sum(applies) if applies else float("nan")  # nothing applies: the response has no score
        scores.append({"overall": overall, **{name: values[row] for name, values in (results | columns).items()}})
    return scores


def wanted(parts: Sequence[Part]) -> set[str] | None:
    """Names of the arguments that the functions take; None where one takes all."""
    names: set[str] = set()
    for part in (part for part in parts if not isinstance(part.function, str)):
        parameters = inspect.signature(part.function).parameters.values()
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            return None
        names |= {parameter.name for parameter in parameters}
    return names


def arguments_of(inputs: list[RewardInput], columns: dict[str, Values], names: set[str] | None) -> dict[str, Any]:
    """The arguments of a call, by TRL's names; what functions log goes to `columns`. Of the dataset's columns, those in
    `names`."""
    rows: dict[str, dict[str, Any]] = {}
    for uid in dict.fromkeys(one["uid"] for one in inputs):
        folder, _, place = uid.rpartition(":")
        dataset = _dataset(folder)
        kept = [c for c in dataset.column_names if names is None or c in names or c == "prompt"]
        rows[uid] = dataset.select_columns(kept)[int(place.partition("#")[0])]
    prompts = [rows[one["uid"]]["prompt"] for one in inputs]
    texts = [one["response"] for one in inputs]
    known = [name for name in dict.fromkeys(name for row in rows.values() for name in row) if name not in NOT_COLUMNS]

    def log_metric(name: str, value: float) -> None:
        columns[name] = [float(value)] * len(inputs)

    def log_extra(name: str, values: Sequence[Any]) -> None:
        if len(values) == len(inputs) and all(value is None or isinstance(value, Real) for value in values):
            columns[name] = [None if value is None else float(value) for value in values]
        else:
            logger.warning("log_extra('%s') is left out: a number or None for each response is kept", name)

    return {
        "prompts": prompts,
        "completions": [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        "completion_ids": [one["response_ids"] for one in inputs],
        **{name: [rows[one["uid"]].get(name) for one in inputs] for name in known},
        "trainer_state": SimpleNamespace(global_step=inputs[0]["step"]),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def call(part: Part, inputs: list[RewardInput], arguments: dict[str, Any], columns: dict[str, Values]) -> Any:
    """The function's results, or the coroutine that gives them."""
    if isinstance(part.function, str):
        return own_results(part, inputs, columns)
    parameters = inspect.signature(part.function).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return part.function(**{name: value for name, value in arguments.items() if takes_all or name in parameters})


def own_results(part: Part, inputs: list[RewardInput], columns: dict[str, Values]) -> Values:
    """The results of a reward function of this framework; its components become columns."""
    function, module = own_function(part.function)
    batch = getattr(module, "REWARD_TYPE", RewardType.batch) == RewardType.batch
    found = function(inputs) if batch else [function(one) for one in inputs]
    for name in found[0]:
        if name != "overall":
            columns[f"{part.name}/{name}"] = [one[name] for one in found]
    return [one["overall"] for one in found]


def own_function(reference: str) -> tuple[Callable[..., Any], Any]:
    """The function that `reference` names, and its module. Raises ValueError or FileNotFoundError."""
    function = import_function(reference, "reward_funcs")
    return function, import_file(reference.rpartition(":")[0], "reward_funcs")


def checked(name: str, values: Any, count: int) -> Values:
    """A function's results, one per response."""
    if not hasattr(values, "__len__") or len(values) != count:
        length = len(values) if hasattr(values, "__len__") else f"a {type(values).__name__}"
        raise ValueError(f"the reward function {name} returned {length} for {count} completions: a list, one each")
    return [None if value is None else float(value) for value in values]
