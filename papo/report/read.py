"""Runs as the report shows them: metrics by chart, chosen samples with their pictures, settings and machine."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

DIGITS = 5  # significant ones, of what a chart shows
MOST_SAMPLES = 200  # of all runs together

# Titles, each with expressions of the metrics under it, in this order; a metric belongs to the first that takes it.
GROUPS = {
    "Does it look?": (
        r"actor/perception_kl",
        r"actor/masked_\w+",
        r"actor/(?!ref_|ppo_)\w*kl",
        r"val/.*(blank|copied).*",
    ),
    "Does it learn?": (r"train/(reward|accuracy)", r"val/(reward|accuracy)", r"val/.*", r"train/(?!filter).*"),
    "Is it stable?": (r"actor/(entropy|ref_kl|grad_norm)", r"(actor|critic|rollout|reward|train)/.*"),
    "Is it fast?": (r"timing_s/step", r"perf/.*", r"timing_s/.*"),
}


@dataclass
class Run:
    """A run's part of the page.

    Attributes:
        series: By metric (steps, values).
        pictures: By their path in the run's folder, as data: addresses.
    """

    name: str
    path: str
    series: dict[str, tuple[list[int], list[float | None]]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def read_run(path: str, name: str, samples: int) -> Run:
    """The run in the folder `path`, with at most about `samples` samples. Raises ValueError where it is no run."""
    if not os.path.isfile(os.path.join(path, "metrics.jsonl")):
        raise ValueError(f"'{path}' is no run's folder: it has no metrics.jsonl")
    run = Run(name, os.path.abspath(path))
    for line in _lines(path, "metrics.jsonl"):
        step = line.pop("step")
        for metric, value in line.items():
            steps, values = run.series.setdefault(metric, ([], []))
            steps.append(step)
            values.append(None if value is None else float(f"{value:.{DIGITS}g}"))
    run.events = list(_lines(path, "events.jsonl"))
    run.samples = chosen(lambda: _lines(path, "samples.jsonl"), samples)
    for sample in run.samples:
        for file in sample.get("pictures", {}).values():
            if file not in run.pictures and os.path.isfile(os.path.join(path, file)):
                with open(os.path.join(path, file), "rb") as content:
                    run.pictures[file] = f"data:image/jpeg;base64,{base64.b64encode(content.read()).decode()}"
    run.settings = flat(_yaml(path, "config.yaml"))
    run.summary, run.machine = _json(path, "summary.json"), _json(path, "machine.json")
    return run


def names_of(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [os.path.abspath(path).strip(os.sep).split(os.sep) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is named twice: {', '.join(paths)}")


def chosen(read: Callable[[], Iterable[dict[str, Any]]], most: int) -> list[dict[str, Any]]:
    """Samples of steps that are spread evenly over the run, half of them of validations, each with the mark `right`,
    and `changed` where the answer to a validation's question is right and was wrong the time before, or the reverse.

    Args:
        read: Gives all samples, one after the other; a long run has gigabytes of them.
    """
    counts: dict[str, Counter[int]] = {"val": Counter(), "train": Counter()}
    for sample in read():
        counts[sample["split"]][sample["step"]] += 1
    wanted = {split: _spread(found, most // 2) for split, found in counts.items()}
    kept, before = [], {}
    for sample in read():
        score = sample["score"]
        value = score.get("accuracy") if score.get("accuracy") is not None else score.get("overall")
        sample["right"] = None if value is None else value >= 0.5
        if sample["split"] == "val" and sample["right"] is not None:
            sample["changed"] = before.get(sample["uid"], sample["right"]) != sample["right"]
            before[sample["uid"]] = sample["right"]
        if sample["step"] in wanted[sample["split"]]:
            kept.append(sample)
    return kept


def _spread(counts: Counter[int], most: int) -> set[int]:
    """Steps, the first and the last among them, that have about `most` samples together."""
    steps = sorted(counts)
    each = max(1, counts.total() // max(len(steps), 1))
    count = min(len(steps), max(1, most // each))
    return {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The groups of charts: title and metrics, in order, and those that have one value alone, with it."""
    left = sorted({metric for run in runs for metric in run.series})
    groups = {}
    for title, patterns in GROUPS.items():
        groups[title] = [name for pattern in patterns for name in left if re.fullmatch(pattern, name)]
        groups[title] = list(dict.fromkeys(groups[title]))
        left = [name for name in left if name not in groups[title]]
    first = ["Does it learn?", "Does it look?"]  # a person asks in this order
    found = []
    for title in dict.fromkeys([*first, *GROUPS]):
        values = {name: {v for run in runs for v in run.series.get(name, ((), ()))[1]} for name in groups[title]}
        constant = [(name, next(iter(seen))) for name, seen in values.items() if len(seen) == 1]
        metrics = [name for name in groups[title] if name not in dict(constant)]
        found.append({"title": title, "metrics": metrics, "constant": constant})
    return [group for group in found if group["metrics"] or group["constant"]]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer.seed": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _lines(folder: str, name: str) -> Iterator[dict[str, Any]]:
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))  # a run may be writing the last one


def _json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _yaml(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)
