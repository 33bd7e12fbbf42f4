"""Answers as they are kept: samples.jsonl, one line per answer, in the names that lmms-eval uses."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from verl.utils.files import atomic_path
from verl.workers.reward.base import Outcome, RewardInput
from verl.workers.reward.graders import boxed

ORIGINAL = "original"


def record(
    name: str, view: str, sample: int, given: RewardInput, outcome: Outcome, arguments: dict[str, Any]
) -> dict[str, Any]:
    """The line of an answer.

    Args:
        name: Of the data set.
        arguments: How it was sampled.
    """
    score = dict(outcome.score) if outcome.score is not None else None
    file, _, number = given["uid"].rpartition(":")
    line = {"set": name, "view": view, "uid": given["uid"], "sample": sample}
    line |= {"doc_id": int(number), "doc": {"problem": given["problem"], "file": os.path.basename(file)}}
    line |= {"target": given["ground_truth"], "arguments": arguments, "resps": [[given["response"]]]}
    line |= {"filtered_resps": [boxed(given["response"])], "token_counts": given["response_length"]}
    line["accuracy"] = score and (score["overall"] if score.get("accuracy") is None else score["accuracy"])
    line["score"] = score
    return line if outcome.failure is None else line | {"not_graded": outcome.failure.reason}


class Records:
    """The answers of one model, in `folder`. What is there from an earlier start is kept, if it was asked alike.

    Args:
        settings: All that decides on an answer.

    Raises ValueError where the folder holds answers that were asked otherwise.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / "samples.jsonl"
        recorded = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if recorded.is_file():
            earlier = json.loads(recorded.read_text(encoding="utf-8"))
            changed = sorted(key for key in settings.keys() | earlier.keys() if settings.get(key) != earlier.get(key))
            if changed:
                raise ValueError(
                    f"{folder} holds answers that were asked with other settings ({', '.join(changed)}): give another "
                    "--out, or delete that folder"
                )
        else:
            with atomic_path(str(recorded)) as temporary:
                Path(temporary).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self.lines = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a kill has cut off is taken away."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Write answers, behind what is there, and to the disk."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines += lines

    def keep_whole(self, answers: int) -> dict[str, set[str]]:
        """The questions, by set, that have all of their `answers`; those of others, which a kill has cut off, are
        dropped."""
        counts = Counter((line["set"], line["uid"]) for line in self.lines)
        whole = [line for line in self.lines if counts[line["set"], line["uid"]] == answers]
        if len(whole) < len(self.lines):
            with atomic_path(str(self.path)) as temporary:
                Path(temporary).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole))
            self.lines = whole
        found: dict[str, set[str]] = {}
        for line in whole:
            found.setdefault(line["set"], set()).add(line["uid"])
        return found

    def scores(self, name: str, view: str = ORIGINAL) -> dict[str, list[float]]:
        """Accuracies of the answers under a view, by question; answers that could not be graded are left out."""
        found: dict[str, list[float]] = {}
        for line in self.lines:
            if line["set"] == name and line["view"] == view:
                graded = found.setdefault(line["uid"], [])
                graded += [line["accuracy"]] if line["accuracy"] is not None else []
        return found
