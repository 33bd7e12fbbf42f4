"""How long prompts are, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from verl.utils.files import atomic_path

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
