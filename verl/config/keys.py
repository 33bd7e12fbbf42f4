"""The reference of all config keys, made from the dataclasses, and the nearest key to one that does not exist."""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_type_hints

from omegaconf import MISSING

from verl.config.config import Config
from verl.config.option import BOUNDS, range_in_words
from verl.config.store import GROUPS, store_schema

# Hydra's groups, and the keys under which their options are entered by name.
PLACES = {
    "term": "algorithm.terms",
    "view": "algorithm.views",
    "shaper": "algorithm.shapers",
    "reward": "worker.reward.extra",
}
NAME = "NAME"


@dataclass(frozen=True)
class Key:
    """One key. `kind` is the option of a group that has it, such as "term: policy"; empty for keys of every config."""

    key: str
    kind: str
    values: str
    default: str
    doc: str


def reference(prefix: str = "") -> list[Key]:
    """Every key that begins with `prefix`, those of terms, views and shapers as algorithm.terms.NAME.KEY."""
    store_schema()
    found = list(_keys(Config, "", ""))
    for group, place in PLACES.items():
        for name, config_class in sorted(GROUPS.get(group, {}).items()):
            found += _keys(config_class, f"{place}.{NAME}", f"{group}: {name}")
    return [key for key in found if key.key.startswith(prefix)]


def _keys(config_class: type, prefix: str, kind: str) -> Iterator[Key]:
    types = get_type_hints(config_class)
    for one in fields(config_class):
        key, default = f"{prefix}.{one.name}" if prefix else one.name, _default(one)
        if is_dataclass(default):
            yield from _keys(type(default), key, kind)
        elif "doc" in one.metadata:
            yield Key(key, kind, _values(types[one.name], one), _written(default), one.metadata["doc"])


def _default(one: Field) -> Any:
    return one.default_factory() if one.default_factory is not NO_DEFAULT else one.default


def _values(annotation: Any, one: Field) -> str:
    """The values that a key takes."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(member.value for member in annotation)
    if set(BOUNDS) & one.metadata.keys():
        kind = "integer" if "int" in str(annotation) else "number"
        return f"{kind}, {range_in_words(one).rstrip(',')}"
    names = {"<class 'int'>": "integer", "<class 'float'>": "number", "<class 'bool'>": "true, false"}
    names |= {"<class 'str'>": "text", "str | None": "text, or null", "bool | None": "true, false, or null"}
    if "PromptTruncation" in str(annotation):
        return "drop, error, left, or null"
    return names.get(str(annotation), str(annotation).replace("typing.", "").replace("dict[str, Any]", "mapping"))


def _written(value: Any) -> str:
    if value == MISSING:
        return "required"
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str) and value else json.dumps(value)


def as_text(keys: Sequence[Key]) -> str:
    """The keys for a terminal."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    lines = []
    for key in keys:
        head = f"{key.key} = {key.default}" + (f"  [{key.kind}]" if key.kind else "")
        lines += [
            head,
            *textwrap.wrap(f"{key.doc} ({key.values})", width, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines) + "\n"


def as_markdown(keys: Sequence[Key]) -> str:
    """The keys as a page, a table for each section."""
    lines = ["# Every key", "", "Made by `papo keys --markdown > configs/KEYS.md`; a test keeps it current.", ""]
    section = None
    for key in keys:
        own = key.kind or ".".join(key.key.split(".")[: -1 if key.key.count(".") < 3 else 2])
        if own != section:
            place = f"`{key.key.rpartition('.')[0]}`" if key.kind else f"`{own}`"
            lines += ["", f"## {key.kind or own}", ""] if section is not None else [f"## {own}", ""]
            lines += [f"Keys under {place}.", ""] * bool(key.kind)
            lines += ["| key | default | values | |", "|---|---|---|---|"]
            section = own
        name = key.key.rpartition(".")[2] if key.kind else key.key.removeprefix(f"{own}.")
        cells = (f"`{name}`", f"`{key.default}`", key.values, key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def nearest(word: str, known: Sequence[str], count: int = 3) -> str:
    """The nearest of `known`, in words for an error; all of them where none is near and they are few."""
    close = difflib.get_close_matches(word, known, count, 0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(known) or 'none'}" if len(known) <= 12 else ""


def nearest_keys(key: str, composed: Sequence[str]) -> str:
    """The nearest of the `composed` keys, by the whole key or else by its last word wherever it stands."""
    close = difflib.get_close_matches(key, composed, 2, 0.75)
    last = key.rpartition(".")[2]
    close += [k for k in composed if k.rpartition(".")[2] == last and k not in close][:2]
    if not close:
        siblings = [k for k in composed if k.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"there are: {', '.join(s.rpartition('.')[2] for s in siblings)}" if siblings else "see `papo keys`"
    return f"did you mean {' or '.join(close)}?"
