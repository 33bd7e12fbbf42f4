"""Models that can be evaluated: Hugging Face folders, hub names, runs, and checkpoints, also EasyR1's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from papo.tools.export.source import Source, find_source
from verl.utils.files import check_model_path


@dataclass(frozen=True)
class Model:
    """A model under a name.

    Attributes:
        path: A Hugging Face folder or hub name; of a checkpoint its own folder.
        source: The checkpoint, which has to be exported first; None for the others.
    """

    name: str
    path: str
    source: Source | None = None

    def identity(self) -> dict[str, Any]:
        """Path, and its files' sizes and times, which another model at the same path later will not have."""
        top = self.source.actor if self.source else self.path
        files = sorted(entry.path for entry in os.scandir(top) if entry.is_file()) if os.path.isdir(top) else []
        stats = {os.path.basename(path): os.stat(path) for path in files}
        return {"path": top, "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}

    @contextmanager
    def folder(self, dtype: str) -> Iterator[str]:
        """The model as a Hugging Face folder or hub name; a checkpoint is exported in `dtype`, with its adapter merged,
        and that export is deleted afterwards."""
        if self.source is None:
            yield self.path
            return
        from papo.tools.export.command import write

        with TemporaryDirectory(prefix="papo-eval-") as temporary:
            folder = os.path.join(temporary, "model")
            write(self.source, folder, dtype, self.source.has_adapter, self.name)
            yield folder


def find_models(references: list[str], local: bool = True) -> list[Model]:
    """The models that `references`, each a path, a hub name or NAME=one of those, mean; without `local` they are what a
    server calls them. Raises ValueError or FileNotFoundError."""
    models = [_find(reference, local) for reference in references]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called '{name}': write NAME={references[names.index(name)]}")
    return models


def _find(reference: str, local: bool) -> Model:
    name, given, path = reference.partition("=")
    if not given or os.path.exists(reference):
        name, path = "", reference
    if not local:
        return Model(name or path.strip("/").replace("/", "--"), path)
    if not os.path.isdir(path):
        check_model_path(path)
        return Model(name or path.replace("/", "--"), path)
    short = os.path.relpath(path).strip("./").replace("/", "--") or os.path.basename(os.path.abspath(path))
    if os.path.isfile(os.path.join(path, "config.json")):
        return Model(name or short, path)
    return Model(name or short, path, find_source(path))
