"""`papo compare`: what is run again, and what the table says. Runs themselves are replaced by their metrics."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from papo.tools import compare
from papo.tools.compare import Comparison, Variant, mean_and_interval, seeds_of, table

pytestmark = pytest.mark.usefixtures("in_repository")


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """The commands that were started; each leaves a run whose accuracy is its seed / 10, plus 0.1 for DAPO."""
    started = []

    def run(words: list[str], **_):
        started.append(words)
        given = dict(word.split("=", 1) for word in words if word.startswith("trainer."))
        folder = Path(given["trainer.output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        accuracy = int(given["trainer.seed"]) / 10 + 0.1 * ("dapo" in words)
        (folder / "metrics.jsonl").write_text(json.dumps({"timing_s/step": 2.0, "val/accuracy": accuracy}) + "\n")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return started


def train(out: Path, *variants: str, seeds: str = "2") -> Comparison:
    comparison = Comparison([Variant.parse(text) for text in variants], seeds_of(seeds), "digits", out, jobs=2)
    comparison.train()
    return comparison


def test_only_what_is_missing_or_was_made_otherwise_runs(runs, tmp_path, monkeypatch):
    train(tmp_path, "grpo")
    assert len(runs) == 2
    train(tmp_path, "grpo")
    assert len(runs) == 2
    train(tmp_path, "grpo", "mine: grpo algorithm.terms.entropy.coef=0.1", seeds="3")
    assert len(runs) == 6
    monkeypatch.setattr(compare, "code_digest", lambda: "another")
    train(tmp_path, "grpo")
    assert len(runs) == 8


def test_differences_are_paired_by_seed(runs, tmp_path):
    rows = train(tmp_path, "grpo", "dapo", seeds="1,2,4").evaluate(["val/accuracy"])
    assert rows[1]["step_seconds"] == 2.0 and rows[0]["val/accuracy"]["values"] == [0.1, 0.2, 0.4]
    assert rows[1]["val/accuracy"]["difference"] == pytest.approx(0.1)
    assert rows[1]["val/accuracy"]["difference_interval"] == pytest.approx(0.0, abs=1e-9)
    assert "| dapo | 33.3 ± 37.9 | +10.0 ± 0.0 | 20.0, 30.0, 50.0 |" in table(rows, "val/accuracy")
    assert mean_and_interval([0.5]) == (0.5, None)


def test_a_run_that_fails_is_named_after_the_others_have_ended(tmp_path, monkeypatch):
    started = []

    def fail(words, **_):
        started.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(compare.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="'grpo' with seed 1 failed with exit code 3"):
        train(tmp_path, "grpo")
    assert len(started) == 2
    with pytest.raises(ValueError, match="two variants have the same name"):
        train(tmp_path, "a: grpo", "a: dapo")
