"""The work of a step in computed tokens: shared out among ranks, and cut into micro-batches under a budget.

Responses to one prompt stay together, so that their prompt is computed once; they are parted only where a rank would
have nothing to do, or a group alone is more than a budget.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from verl.columns import ORIGINAL, view_column
from verl.models.packing import prefix_keys
from verl.protocol import DataProto

PATCH_TOKENS = 1 / 4  # a patch costs the vision towers of 3B and 7B models an eighth to a quarter of a token


@dataclass(frozen=True)
class Unit:
    """Rows that stay together, and the tokens that a forward of them computes."""

    rows: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Share:
    """A rank's part of a step.

    Attributes:
        rows: [rows of the rank] places in the step's batch, mini-batch after mini-batch.
        sizes: Number of rows of each mini-batch.
    """

    rows: torch.Tensor
    sizes: list[int]


class Work:
    """Computed tokens of rows under several views: each different prefix once, with its image patches, and each
    response once per view that covers its row."""

    def __init__(self, batch: DataProto, views: Sequence[str], patch_tokens: float = PATCH_TOKENS) -> None:
        self.group = prefix_keys(batch, ORIGINAL)
        self.prefixes: list[dict[object, int]] = [{} for _ in self.group]
        self.responses = [0] * len(self.group)
        lengths = batch["response_mask"].sum(dim=1).tolist()
        prompts = (batch["attention_mask"].sum(dim=1) - batch["response_mask"].sum(dim=1)).tolist()
        for view in views:
            covered = [True] * len(batch) if view == ORIGINAL else batch[view_column(view, "rows")].tolist()
            keys = self.group if view == ORIGINAL else prefix_keys(batch, view)
            for row in (row for row, covers in enumerate(covered) if covers):
                patches = batch[view_column(view, "mm_inputs")][row].patches
                self.prefixes[row][keys[row]] = prompts[row] + math.ceil(patches * patch_tokens)
                self.responses[row] += lengths[row]

    def tokens(self, rows: Sequence[int]) -> int:
        prefixes = {key: tokens for row in rows for key, tokens in self.prefixes[row].items()}
        return sum(prefixes.values()) + sum(self.responses[row] for row in rows)

    def unit(self, rows: Sequence[int]) -> Unit:
        return Unit(tuple(rows), self.tokens(rows))

    def units(self, rows: Sequence[int], budget: float = float("inf")) -> list[Unit]:
        """The groups among these rows, those of more than `budget` tokens cut."""
        groups: dict[object, list[int]] = {}
        for row in rows:
            groups.setdefault(self.group[row], []).append(row)
        found = []
        for group in groups.values():
            start = 0
            if self.tokens(group) > budget:
                for end in range(2, len(group) + 1):
                    if end - start > 1 and self.tokens(group[start:end]) > budget:
                        found.append(self.unit(group[start : end - 1]))
                        start = end - 1
            found.append(self.unit(group[start:]))
        return found


def spread(units: Sequence[Unit], bins: int) -> list[list[Unit]]:
    """`bins` lists of units of about equally many tokens: the heaviest first, each to where there are the fewest."""
    shares: list[list[Unit]] = [[] for _ in range(bins)]
    loads = [(0, place) for place in range(bins)]
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        load, place = heapq.heappop(loads)
        shares[place].append(unit)
        heapq.heappush(loads, (load + unit.tokens, place))
    return shares


def load(units: Sequence[Unit]) -> int:
    return sum(unit.tokens for unit in units)


def share_out(work: Work, rows: Sequence[int], ranks: int) -> list[list[Unit]]:
    """The units of a mini-batch, by rank. The largest group of the busiest rank is cut in two as long as that helps."""
    units = work.units(rows)
    shares = spread(units, ranks)
    while True:
        largest = max(max(shares, key=load), key=lambda unit: unit.tokens)
        if len(largest.rows) < 2:
            return shares
        half = len(largest.rows) // 2
        units = [unit for unit in units if unit is not largest]
        units += [work.unit(largest.rows[:half]), work.unit(largest.rows[half:])]
        tried = spread(units, ranks)
        if sorted(map(load, tried), reverse=True) >= sorted(map(load, shares), reverse=True):
            return shares
        shares = tried


def share_rows(batch: DataProto, mini_batches: int, ranks: int, views: Sequence[str]) -> list[Share]:
    """The parts of a step, by rank. Consecutive rows make a mini-batch, whatever the number of ranks; it must have a
    row for each of them."""
    work, size = Work(batch, views), len(batch) // mini_batches
    rows: list[list[int]] = [[] for _ in range(ranks)]
    sizes: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(batch), size):
        for rank, units in enumerate(share_out(work, range(start, start + size), ranks)):
            own = sorted(row for unit in units for row in unit.rows)
            if not own:
                raise ValueError(f"a mini-batch of {size} rows has none for rank {rank} of {ranks}")
            rows[rank] += own
            sizes[rank].append(len(own))
    return [Share(torch.tensor(own), of) for own, of in zip(rows, sizes, strict=True)]


def micro_batches(
    batch: DataProto, views: Sequence[str], budget: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, DataProto]]:
    """(places in `batch`, rows) of each micro-batch: at most `budget` computed tokens, a single longer row apart. Rows
    without a response are in none.

    All ranks make equally many, since FSDP's collectives in one wait for those of the others; a rank with less to do
    fills up with its first row, as a prompt without response, at no places.
    """
    work = Work(batch, views)
    units = work.units([row for row, response in enumerate(work.responses) if response], budget)
    count = max(1, min(-(-load(units) // budget), len(units)))
    while count < len(units) and max(map(load, spread(units, count))) > budget:
        count += 1
    agreed = torch.tensor(count, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    for share in spread(units, int(agreed)):
        places = torch.tensor(sorted(row for unit in share for row in unit.rows), dtype=torch.int64)
        yield places, batch.rows(places) if len(places) else silent(batch)


def silent(batch: DataProto) -> DataProto:
    """The first row without its response."""
    row = batch.rows(slice(0, 1))
    return row.with_columns({"response_mask": torch.zeros_like(row["response_mask"])})
