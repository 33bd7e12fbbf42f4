"""Parallel scan over the rows of a large set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from verl.data.rows import PromptRows
from verl.utils.process import usable_cores

T = TypeVar("T")
CHUNK = 64  # rows that a process holds at a time, with their images' bytes
FEW = 1024  # rows for which starting processes takes longer than they save


def scan(
    rows: PromptRows, look: Callable[[int, list[dict[str, Any]]], list[T]], description: str, workers: int | None = None
) -> Iterator[T]:
    """The result of `look` for each row, in order, with a progress bar.

    Args:
        look: takes the index of a first row, and rows from there; returns one value for each of them.
        workers: processes, at most and by default one per core.

    Raises:
        RuntimeError: a process died, as the kernel ends them where memory is short.
    """
    workers = min(workers or usable_cores(), usable_cores()) if len(rows) > FEW else 0
    workers = 0 if workers == 1 else workers
    # Forked, so that neither the rows nor a tokenizer have to be copied into the processes.
    context = "fork" if workers else None
    loader = DataLoader(
        _Chunks(rows, look), batch_size=None, num_workers=workers, collate_fn=_as_is, multiprocessing_context=context
    )
    with tqdm(total=len(rows), desc=description, unit="row", leave=False) as bar:
        for found in loader:
            bar.update(len(found))
            yield from found


class _Chunks(Dataset):
    def __init__(self, rows: PromptRows, look: Callable[[int, list[dict[str, Any]]], list[T]]) -> None:
        self.rows = rows
        self.look = look

    def __len__(self) -> int:
        return -(-len(self.rows) // CHUNK)

    def __getitem__(self, chunk: int) -> list[T]:
        start = chunk * CHUNK
        return self.look(start, self.rows.batch(start, min(start + CHUNK, len(self.rows))))


def _as_is(found: list[T]) -> list[T]:
    return found
