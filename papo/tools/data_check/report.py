"""What was found, in lines for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from papo.tools.data_check.command import BadRow
    from papo.tools.data_check.look import Look
    from verl.data.rows import PromptRows

SHOWN = 110  # characters of an example
NAMED = 4  # files


def report(rows: PromptRows, looks: list[Look], bad: list[BadRow]) -> str:
    """What the rows hold, and under it what is wrong with some, most frequent first."""
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
