"""The results of an evaluation: a summary per model, tables for people, and files that VLMEvalKit reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from papo.evaluation.records import ORIGINAL, Records
from papo.evaluation.statistics import accuracy, paired, percent
from papo.evaluation.suite import Suite
from verl.utils.files import atomic_path


def summarize(suite: Suite, views: Sequence[str], records: Records) -> dict[str, Any]:
    """Summary of a model: of each set the accuracy under each view, the vision gain (accuracy with the real image less
    that under a view) and the perception KL, nats per token; of each group, and of all, the mean over its sets."""
    sets: dict[str, Any] = {}
    for name in (one.name for one in suite.sets):
        lines = [line for line in records.lines if line["set"] == name]
        real = records.scores(name)
        found: dict[str, Any] = {"views": {ORIGINAL: accuracy(real)}, "vision_gain": {}, "perception_kl": {}}
        for view in views:
            seen = records.scores(name, view)
            found["views"][view] = accuracy(seen)
            found["vision_gain"][view] = paired(real, seen)
            with_kl = [line for line in lines if view in line.get("perception_kl", {})]
            tokens = sum(line["token_counts"] for line in with_kl)
            if tokens:  # not from a server, whose model cannot be asked
                total = sum(line["perception_kl"][view] for line in with_kl)
                found["perception_kl"][view] = total / tokens
        originals = [line for line in lines if line["view"] == ORIGINAL]
        found["tokens_per_answer"] = float(np.mean([line["token_counts"] for line in originals]))
        found["not_graded"] = sum(line["accuracy"] is None for line in lines)
        sets[name] = found
    groups = {**suite.groups(), "all": list(sets)}
    averages = {
        group: {
            view: float(np.mean([sets[n]["views"][view]["accuracy"] for n in names])) for view in (ORIGINAL, *views)
        }
        for group, names in groups.items()
    }
    return {"suite": suite.name, "sets": sets, "groups": averages}


def compare(suite: Suite, models: dict[str, Records]) -> dict[str, dict[str, Any]]:
    """Paired difference, of each further model and set, to the first model, on real images."""
    first, *others = models
    return {
        other: {one.name: paired(models[other].scores(one.name), models[first].scores(one.name)) for one in suite.sets}
        for other in others
    }


def tables(summaries: dict[str, dict[str, Any]], differences: dict[str, dict[str, Any]], n: int) -> str:
    """All of it as Markdown."""
    first = next(iter(summaries.values()))
    sets, groups = list(first["sets"]), list(first["groups"])
    if len(groups) == 1 and len(sets) == 1:
        groups = []  # the average of one
    parts = [f"avg@{n}, %, with 95 % intervals over questions:\n"]
    parts += _table(["model", *sets, *groups], [
        [
            name,
            *(_accuracy(found["sets"][one]["views"][ORIGINAL]) for one in sets),
            *(percent(found["groups"][group][ORIGINAL]) for group in groups),
        ]
        for name, found in summaries.items()
    ])  # fmt: skip
    if n > 1:
        parts.append(f"\npass@{n}, %:\n")
        parts += _table(["model", *sets], [
            [name, *(percent(found["sets"][one]["views"][ORIGINAL]["pass"]) for one in sets)]
            for name, found in summaries.items()
        ])  # fmt: skip
    views = [view for view in first["sets"][sets[0]]["views"] if view != ORIGINAL]
    if views:
        parts.append("\nDoes it look? The same questions under other images; the gain is what the real image adds:\n")
        rows = []
        for name, found in summaries.items():
            for one in sets:
                for view in views:
                    of = found["sets"][one]
                    gain, divergence = of["vision_gain"][view], of["perception_kl"].get(view)
                    rows.append([name, one, view, _accuracy(of["views"][view])])
                    rows[-1] += [percent(gain["difference"], gain["interval"], "+")]
                    rows[-1] += ["" if divergence is None else f"{divergence:.3f}"]
        parts += _table(["model", "set", "view", "accuracy", "vision gain", "perception KL, nats per token"], rows)
    if differences:
        parts.append(f"\nAgainst {next(iter(summaries))}, on the same questions, points:\n")
        rows = [
            [
                name,
                one,
                percent(d["difference"], d["interval"], "+"),
                f"{d['better']} / {d['worse']}",
                _p(d["sign_test_p"]),
            ]
            for name, found in differences.items()
            for one, d in found.items()
        ]
        parts += _table(["model", "set", "difference", "questions better / worse", "sign test, p"], rows)
    return "\n".join(parts) + "\n"


def _accuracy(found: dict[str, Any]) -> str:
    return percent(found["accuracy"], found["interval"])


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def write_json(path: Path, content: Any) -> None:
    with atomic_path(str(path)) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def export_vlmevalkit(model: str, suite: Suite, records: Records, folder: Path) -> list[Path]:
    """The first answer to each question as VLMEvalKit's prediction files, MODEL_SET.tsv with a column `prediction`."""
    written = []
    for one in suite.sets:
        lines = [x for x in records.lines if (x["set"], x["view"], x["sample"]) == (one.name, ORIGINAL, 0)]
        path = folder / f"{model}_{one.name}.tsv"
        with atomic_path(str(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "question", "answer", "prediction"])
            for line in sorted(lines, key=lambda x: x["doc_id"]):
                writer.writerow([line["doc_id"], line["doc"]["problem"], line["target"], line["resps"][0][0]])
        written.append(path)
    return written
