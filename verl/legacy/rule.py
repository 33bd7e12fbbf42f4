"""Rules: the rows of the table of old keys (verl/legacy/table.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# New key -> value. A key that begins with "/" is an entry of a preset's defaults list: "/term@algorithm.terms.policy".
Changes = dict[str, Any]
Old = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """Translation of one old key, or of a few that belong together.

    Attributes:
        defaults: The old keys with upstream's defaults, which hold where a file is silent. A key whose default is a
            dict holds a dict.
        apply: From every old key, given or by default, to what it is here; raises ValueError by `refusal`.
        why: Said where nothing comes of it.
        differs: A line on what is not as it was there and changes numbers, with the way to theirs; empty for none.
        plain: Old keys (also inside a dict) that are one key here, whatever the others say.
        alone: Given as overrides of a preset, the keys have a meaning without the rest of an old config.
    """

    defaults: dict[str, Any]
    apply: Callable[[Old], Changes]
    why: str = "it has no effect here"
    differs: Callable[[Old], str] = lambda old: ""
    plain: dict[str, str] = field(default_factory=dict)
    alone: bool = False


def refusal(key: str, value: object, way_out: str) -> ValueError:
    """The error for an old key that has no meaning here."""
    return ValueError(f"{key}={value}, a key of EasyR1 or PAPO, is not taken over: {way_out}")


def same(key: str, default: Any) -> Rule:
    """The key and its meaning are the same here."""
    return renamed(key, key, default)


def renamed(key: str, new: str, default: Any, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The meaning is the same under another name, or with other values."""
    return Rule({key: default}, lambda old: {new: convert(old[key])})


def choice(key: str, new: str, default: Any, choices: dict[Any, Any], way_out: str) -> Rule:
    """A renamed key of which only these values have a meaning here."""

    def convert(value: Any) -> Any:
        if value not in choices:
            raise refusal(key, value, way_out)
        return choices[value]

    return renamed(key, new, default, convert)


def no_effect(key: str, default: Any, why: str) -> Rule:
    """A key that changes no result here, whatever its value."""
    return Rule({key: default}, lambda old: {}, why)


def only(key: str, default: Any, allowed: tuple[Any, ...], way_out: str) -> Rule:
    """These values say what is the case here anyway; any other is refused."""

    def apply(old: Old) -> Changes:
        if old[key] not in allowed:
            raise refusal(key, old[key], way_out)
        return {}

    return Rule({key: default}, apply, "so it is here")
