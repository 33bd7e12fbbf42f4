"""PAPOConfig: TRL's arguments, as keys of this framework."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from papo.api.arguments import ARGUMENTS, SECTIONS
from verl.config.keys import nearest
from verl.legacy.rule import Changes
from verl.legacy.translate import Preset

RANKS = "trainer.n_gpus_per_node"


class PAPOConfig:
    """The arguments of TRL 1.7.1's PAPOConfig, with its names and defaults; examples/python_api.md says what each is
    here.

    Args:
        overrides: Hydra overrides, "key=value", for what TRL has no name for; they come last.

    Raises:
        TypeError: an argument that TRL's PAPOConfig has not.
        ValueError: a value that has no meaning here, with the way out.
    """

    def __init__(self, output_dir: str | None = None, *, overrides: tuple[str, ...] | list[str] = (), **arguments: Any):
        if unknown := [name for name in arguments if name not in ARGUMENTS]:
            words = nearest(unknown[0], list(ARGUMENTS))
            raise TypeError(
                f"PAPOConfig has no argument '{unknown[0]}'{f': {words}' if words else ''} (keys of this framework are "
                "given as overrides=['key=value'])"
            )
        defaults = {name: argument.default for name, argument in ARGUMENTS.items()}
        self.__dict__ |= defaults | arguments | {"output_dir": output_dir, "overrides": list(overrides)}
        self.changes()

    @property
    def ranks(self) -> int:
        """Training ranks: as an override says, or one for each GPU here, or one on CPU."""
        given = [word.partition("=")[2] for word in self.overrides if word.startswith(f"{RANKS}=")]
        return int(given[-1]) if given else (1 if self.use_cpu else max(torch.cuda.device_count(), 1))

    def changes(self) -> Changes:
        """The keys that the arguments set. Raises ValueError for a value that has no meaning here."""
        changes: Changes = {RANKS: self.ranks}
        for name, argument in ARGUMENTS.items():
            value = getattr(self, name)
            if argument.allowed is not None and value not in argument.allowed:
                raise ValueError(f"{name}={value!r}: {argument.here}")
            changes |= argument.apply(self)
        return changes

    def preset(self, changes: Changes | None = None) -> Preset:
        """The preset that the arguments and `changes` are."""
        preset = Preset()
        preset.take(self.changes() | (changes or {}))
        return preset

    def to_preset(self, changes: Changes | None = None) -> str:
        """The arguments and `changes` as a Hydra preset, a file for `--config-dir`; overrides, which a preset cannot
        hold, are comments behind it. Model, data and rewards are in `PAPOTrainer.to_preset`."""
        overrides = "".join(f"# with the override {word}\n" for word in self.overrides)
        return self.preset(changes).to_yaml() + overrides

    def folder(self, model: str) -> str:
        """The run's folder, of the model called `model`."""
        return os.path.abspath(self.output_dir or f"{os.path.basename(model.rstrip('/'))}-PAPO")

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**{name: getattr(self, name) for name in ARGUMENTS}, "overrides": list(self.overrides)}

    def __repr__(self) -> str:
        given = {
            name: value
            for name, value in self.to_dict().items()
            if name not in ARGUMENTS or value != ARGUMENTS[name].default
        }
        return f"PAPOConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


PAPOConfig.__signature__ = inspect.Signature(  # for help() and editors
    [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in {**{n: a.default for n, a in ARGUMENTS.items()}, "overrides": ()}.items()
    ]
)


def as_markdown() -> str:
    """The table of arguments, the last part of examples/python_api.md."""
    lines = []
    for title, section in SECTIONS.items():
        lines += [f"### {title}", "", "| argument | default | here |", "|---|---|---|"]
        lines += [f"| `{name}` | `{one.default!r}` | {one.here} |" for name, one in section.items()]
        lines.append("")
    return "\n".join(lines)
