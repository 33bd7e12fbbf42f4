"""Reading what `papo doctor --json` says."""

from __future__ import annotations

import re


def bad(report: dict, level: str = "error") -> list[dict]:
    return [finding for finding in report["findings"] if finding["level"] == level]


def assert_error(result: tuple[int, dict], topic: str, text: str, fix: str = "") -> None:
    """The run ends with 1, and exactly one error is of this topic and says so."""
    code, report = result
    found = [finding for finding in bad(report) if finding["topic"] == topic]
    assert code == 1 and report["errors"] == len(bad(report))
    assert len(found) == 1, bad(report)
    assert re.search(text, found[0]["text"]) and re.search(fix, found[0]["fix"]), found[0]
