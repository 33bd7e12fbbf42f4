"""Packages as pip leaves them, for a folder on the path."""

from __future__ import annotations

from pathlib import Path


def plant_package(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), code: str | None = None
) -> None:
    """What pip would leave of a package, and where there is code its module."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if code is not None:
        (folder / f"{name.replace('-', '_')}.py").write_text(code)
