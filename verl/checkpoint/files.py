"""The files of a checkpoint: a manifest says what belongs to it, and each is checked before anything is loaded."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import torch

FORMAT = 1
MANIFEST = "manifest.json"
READ_BYTES = 2**24
READERS = 4
PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), torch.Tensor)


class BrokenCheckpoint(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


class FileEntry(TypedDict):
    size: int
    crc32: int


def checksum(path: str) -> int:
    """CRC-32 of a file. It is to find damage, not malice (which loading is safe against by itself), and runs at
    gigabytes per second without another package; a cryptographic hash is four times slower than a good disk."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def seal(folder: str, names: Iterable[str]) -> dict[str, FileEntry]:
    """Bring these files of `folder` to the disk, and describe them for the manifest."""
    entries = {}
    for name in names:
        path = os.path.join(folder, name)
        sync(path)
        entries[name] = FileEntry(size=os.path.getsize(path), crc32=checksum(path))
    return entries


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a rename may reach it before they do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_in(folder: str) -> list[str]:
    """The paths of all files below `folder`, relative to it, in order."""
    found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in found)


def write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: str, about: dict[str, Any], files: dict[str, FileEntry]) -> None:
    """Write the file that makes a checkpoint whole: the last one. `about`: step, world size, config."""
    write_json(os.path.join(folder, MANIFEST), {"format": FORMAT, **about, "files": files})


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest that `write_manifest` wrote. Raises BrokenCheckpoint naming the file."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing: this checkpoint was not finished, or is none") from error
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BrokenCheckpoint(f"{path} has format {found}, this version reads {FORMAT}")
    if not isinstance(manifest.get("files"), dict):
        raise BrokenCheckpoint(f"{path} lists no files")
    return manifest


def verify(folder: str, below: str = "") -> dict[str, Any]:
    """Check every file that the manifest lists (those whose path begins with `below`); returns the manifest.

    Raises BrokenCheckpoint naming the first file that is missing, too short or too long, or otherwise damaged.
    """
    manifest = read_manifest(folder)
    entries = {name: entry for name, entry in manifest["files"].items() if name.startswith(below)}
    for name, entry in entries.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise BrokenCheckpoint(f"{path} is missing")
        if os.path.getsize(path) != entry["size"]:
            raise BrokenCheckpoint(f"{path} has {os.path.getsize(path)} bytes, and had {entry['size']} when saved")
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: checksum(os.path.join(folder, name)), entries)
        for (name, entry), value in zip(entries.items(), found, strict=True):
            if value != entry["crc32"]:
                raise BrokenCheckpoint(f"{os.path.join(folder, name)} is damaged: its checksum is another than saved")
    return manifest


def save_plain(path: str, value: Any) -> None:
    """torch.save for what `load_plain` takes back. Raises TypeError, naming the place, for anything else."""
    _check_plain(value, os.path.basename(path))
    torch.save(value, path)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, (dict, list, tuple)) and type(value) in PLAIN:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) not in PLAIN:
        raise TypeError(f"{where} is of type {type(value).__name__}: a checkpoint holds tensors and plain values")


def load_plain(path: str) -> Any:
    """Tensors and plain Python values of a file that torch.save wrote; nothing else is unpickled.

    Raises BrokenCheckpoint naming the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is none
        raise BrokenCheckpoint(f"{path} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
