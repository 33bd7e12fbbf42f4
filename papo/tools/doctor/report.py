"""Findings and the table of memory, for people and for machines."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from papo.tools.doctor.case import GIB, Finding, Level, in_gib

if TYPE_CHECKING:
    from papo.tools.doctor.memory import Estimate

MARKS = {Level.ok: "ok", Level.warning: "WARNING", Level.error: "ERROR"}
MARK_WIDTH, TOPIC_WIDTH = 9, 15
NARROW, WIDE = 80, 140


def as_text(sections: dict[str, list[Finding]], estimate: Estimate | None) -> str:
    """The whole report, as wide as the terminal."""
    width = min(max(shutil.get_terminal_size((120, 24)).columns, NARROW), WIDE)
    lines: list[str] = []
    for heading, findings in sections.items():
        lines += [heading, *(line for finding in findings for line in _finding(finding, width)), ""]
        if heading == "memory" and estimate is not None:
            lines += ["", *_roles(estimate), "", *_phases(estimate), ""]
    found = [finding.level for findings in sections.values() for finding in findings]
    errors, warnings = found.count(Level.error), found.count(Level.warning)
    lines.append(f"{errors} error(s), {warnings} warning(s)" + ("" if errors or warnings else ": all is well"))
    return "\n".join(lines) + "\n"


def _finding(finding: Finding, width: int) -> list[str]:
    """Mark, topic and text in columns; the way out below, behind an arrow."""
    margin = " " * (2 + MARK_WIDTH + TOPIC_WIDTH)
    first = f"  {MARKS[finding.level]:{MARK_WIDTH}}{finding.topic:{TOPIC_WIDTH}}"
    options = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(finding.text, initial_indent=first, subsequent_indent=margin, **options)
    if finding.fix:
        lines += textwrap.wrap(finding.fix, initial_indent=f"{margin}-> ", subsequent_indent=f"{margin}   ", **options)
    return lines


def _roles(estimate: Estimate) -> list[str]:
    """Every term, its size and how it was counted."""
    labels = [f"{name} (x {times})" if times > 1 else name for name, (_, times) in estimate.roles.items()]
    width = 2 + max(map(len, labels))
    lines = [f"  {'role':{width}}{'term':29}{'size':>10}   how"]
    for name, (terms, _) in zip(labels, estimate.roles.values(), strict=True):
        for term in terms:
            if term.bytes:
                lines.append(f"  {name:{width}}{term.name:29}{in_gib(term.bytes):>10}   {term.how}")
                name = ""
    return lines


def _phases(estimate: Estimate) -> list[str]:
    """Memory of each role in each phase of a step, and the sum."""
    columns = list(dict.fromkeys(name for phase in estimate.phases for name in phase.parts))
    device = "per GPU" if estimate.device == "cuda" else "of the machine"
    lines = [f"  {f'GiB {device}':24}" + "".join(f"{name:>12}" for name in [*columns, "sum", "there is"])]
    for phase in estimate.phases:
        parts = phase.parts
        cells = [f"{parts[name] / GIB:.1f}" if name in parts else "-" for name in columns]
        cells += [f"{phase.bytes / GIB:.1f}", f"{estimate.capacity / GIB:.1f}"]
        lines.append(f"  {phase.name:24}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def as_json(sections: dict[str, list[Finding]], estimate: Estimate | None) -> dict[str, Any]:
    """The same for machines; sizes in bytes."""
    found = [{"section": heading, **asdict(finding)} for heading, findings in sections.items() for finding in findings]
    report: dict[str, Any] = {
        "errors": sum(finding["level"] == Level.error for finding in found),
        "warnings": sum(finding["level"] == Level.warning for finding in found),
        "findings": found,
    }
    if estimate is not None:
        report["memory"] = asdict(estimate)
        for phase, found in zip(report["memory"]["phases"], estimate.phases, strict=True):
            phase["bytes"] = found.bytes
    return report
