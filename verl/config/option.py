"""Options: fields of config dataclasses with their documentation and bounds, and the one walker that checks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

BOUNDS = ("above", "least", "below", "most")


def option(default: Any, doc: str, **bounds: float) -> Any:
    """A field of a config dataclass.

    Args:
        default: Its value, or a function that makes it (for lists and dicts).
        doc: What it sets, with its unit; shown by `papo keys`.
        bounds: `above` or `least`, `below` or `most`; null is always allowed where the type allows it.
    """
    if unknown := set(bounds) - set(BOUNDS):
        raise TypeError(f"unknown bounds {sorted(unknown)}")
    made = {"default_factory": default} if isinstance(default, Callable) else {"default": default}
    return field(**made, metadata={"doc": doc, **bounds})


def check_options(config: Any, key: str = "") -> None:
    """Check the bounds of every option in `config` and below, then call `check(key)` where a dataclass has one.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    for one in fields(config):
        name, value = f"{key}.{one.name}" if key else one.name, getattr(config, one.name)
        if is_dataclass(value):
            check_options(value, name)
        elif isinstance(value, dict):
            for entry, inner in value.items():
                if is_dataclass(inner):
                    check_options(inner, f"{name}.{entry}")
        elif isinstance(value, (int, float)) and not _within(value, one):
            raise ValueError(f"{name}={value}: {range_in_words(one)} is needed")
    if hasattr(config, "check"):
        config.check(key)


def _within(value: float, one: Field) -> bool:
    bounds = one.metadata
    return (
        math.isfinite(value)
        and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)
        and bounds.get("least", -math.inf) <= value <= bounds.get("most", math.inf)
    )


def range_in_words(one: Field) -> str:
    """The bounds of an option, such as "a value above 0 and at most 1"."""
    above, least, below, most = (f"{one.metadata[b]:g}" if b in one.metadata else None for b in BOUNDS)
    upper = f"below {below}" if below else f"at most {most}" if most else ""
    if least and upper:
        words = f"a value from {least} to {upper.removeprefix('at most ')}"
    elif least:
        words = f"{least} or more"
    elif above:
        words = f"a value above {above}" + (f" and {upper}" if upper else "")
    else:
        words = f"a value {upper}" if upper else "a finite number"
    return f"{words}, or null," if one.default is None else words
