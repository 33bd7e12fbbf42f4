"""Report of a data check, in lines and as histograms."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from papo.tools.data_check import BadRow
    from papo.tools.data_check.look import Look
    from verl.data.rows import PromptRows
from collections.abc import Sequence

from matplotlib.figure import Figure

from verl.utils.files import atomic_path

SHOWN = 110  # characters of an example
NAMED = 4  # files


def report(rows: PromptRows, looks: list[Look], bad: list[BadRow]) -> str:
    """Summary of the rows, and below it the faults of some, most frequent first."""
    lines = [("rows", f"{len(rows):,} in {len(rows.sources)} file(s)")]
    for source in rows.sources[:NAMED]:
        weight = "" if source.weight == 1 else f", {source.weight:g} times in an epoch"
        lines.append(("", f"{source.num_rows:,} in {source.name}{weight}"))
    if len(rows.sources) > NAMED:
        lines.append(("", f"and {len(rows.sources) - NAMED} more file(s)"))
    lines.append(("columns", ", ".join(rows.table.column_names)))
    lines += _images(looks) + _tokens(rows, looks)
    text = "".join(f"{name:16}{value}\n" for name, value in lines)
    return f"{text}\n{_faults(bad)}\n"


def _images(looks: list[Look]) -> list[tuple[str, str]]:
    counts = Counter(len(look.sizes) for look in looks if look.sizes is not None)
    sizes = sorted((size for look in looks for size in look.sizes or ()), key=lambda size: size[0] * size[1])
    lines = [("images", ", ".join(f"{number:,} row(s) with {count}" for count, number in sorted(counts.items())))]
    if sizes:
        chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        smallest, median, largest = (f"{width}x{height}" for width, height in chosen)
        lines.append(("image pixels", f"{smallest} the smallest, {median} the median, {largest} the largest"))
    return lines


def _tokens(rows: PromptRows, looks: list[Look]) -> list[tuple[str, str]]:
    lengths = [look.tokens for look in looks if look.tokens is not None]
    if not lengths:
        return [("prompt tokens", "not counted: --model says whose tokens")]
    limit = rows.config.max_prompt_length
    longer = sum(length > limit for length in lengths)
    median, most = np.quantile(lengths, (0.5, 0.99)).astype(int)
    return [
        ("prompt tokens", f"{min(lengths):,} to {max(lengths):,}, median {median:,}, 99 % up to {most:,}"),
        ("", f"{longer:,} prompt(s) longer than data.max_prompt_length={limit:,} (truncation: {rows.config.overlong})"),
    ]


def _faults(bad: list[BadRow]) -> str:
    if not bad:
        return "no row is at fault\n"
    groups: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        groups.setdefault((row.level, row.kind), []).append(row)
    lines = []
    for (level, kind), found in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        first = found[0]
        example = f"{first.file}, row {first.row}: {first.text}"
        example = example if len(example) <= SHOWN else f"{example[:SHOWN]}..."
        lines.append(f"{level.upper():9}{kind:11}{len(found):>8,}  {example}\n")
    count = Counter(row.level for row in bad)
    return "".join(lines) + f"\n{count['error']:,} error(s), {count['warning']:,} warning(s)\n"


BINS = 60
DROPPED = "#c0392b"
KEPT = "#4878a8"


def draw(lengths: Sequence[int], limit: int, path: str) -> None:
    """A PNG at `path`: prompts by their tokens, and those of more than `limit` in red.

    The axis ends where the longest prompt does; it shows the limit where that lies inside it.
    """
    values = np.asarray(lengths)
    longer = int((values > limit).sum())
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(values.min(), values.max() + 1, BINS + 1).round().astype(int)
    edges = np.unique([*edges, limit + 1] if longer else edges)  # no bar on both sides of the limit
    edges = edges[edges <= values.max() + 1]
    axes.hist(values[values <= limit], edges, color=KEPT, label=f"{len(values) - longer:,} prompts fit")
    if longer:
        axes.hist(values[values > limit], edges, color=DROPPED, label=f"{longer:,} are longer")
        axes.axvline(limit, color=DROPPED, linewidth=1, linestyle="--", label=f"data.max_prompt_length = {limit:,}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a prompt, those of its images included")
    axes.set_ylabel("prompts")
    axes.set_title(
        f"{len(values):,} prompts: median {int(np.median(values)):,}, 99 % up to {int(np.quantile(values, 0.99)):,}, "
        f"longest {values.max():,} tokens",
        fontsize=10,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
