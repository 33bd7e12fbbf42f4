"""curves.png: metrics over the steps of a run."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from verl.utils.files import atomic_path

# (title, expression that matches the whole name of each metric); the label is what it captures.
PANELS = (
    ("reward of training responses", r"train/(reward|accuracy)"),
    ("validation accuracy", r"val/(accuracy)"),
    ("divergences", r"actor/(?!ppo_)(\w*kl)"),
    ("entropies", r"actor/(\w*entropy)"),
)
SMOOTHING = 5  # steps


def draw_curves(metrics_path: str, picture_path: str) -> None:
    """Plot what `metrics_path` (metrics.jsonl) holds over steps; panels without data are left out."""
    from matplotlib.figure import Figure  # here: it takes longer to import than to use

    with open(metrics_path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    names = sorted({name for record in records for name in record})
    matched = [(title, [m for m in (re.fullmatch(form, name) for name in names) if m]) for title, form in PANELS]
    panels = [(title, matches) for title, matches in matched if matches]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, matches) in zip(axes.flat, panels, strict=False):
        for match in matches:
            _draw_line(axis, records, match[0], match[1])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    with atomic_path(picture_path) as temporary:
        figure.savefig(temporary, dpi=120, format=os.path.splitext(picture_path)[1].lstrip("."))


def _draw_line(axis: Any, records: list[dict[str, float]], metric: str, label: str) -> None:
    """Few points as they are, many as a running mean over a faint raw line."""
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) < 4 * SMOOTHING:
        axis.plot(steps, values, marker="o", markersize=3, label=label)
        return
    smooth = [sum(w) / len(w) for w in (values[max(0, i - SMOOTHING + 1) : i + 1] for i in range(len(values)))]
    (line,) = axis.plot(steps, smooth, label=label)
    axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
