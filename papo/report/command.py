"""`papo report`: writes the page."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from papo.report.read import MOST_SAMPLES, Run, charts, names_of, read_run
from verl.utils.files import atomic_path


def add_report(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("report", help="runs as one HTML page: curves, and what each token owes to the image")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    command.add_argument("--out", default="report.html", metavar="FILE.html", help="(default: %(default)s)")
    command.set_defaults(run=report)


def report(options: argparse.Namespace) -> None:
    """Read the runs and write the page, whole or not at all."""
    names = names_of(options.runs)
    each = MOST_SAMPLES // len(names)
    runs = [read_run(path, name, each) for path, name in zip(options.runs, names, strict=True)]
    text = page(runs)
    with atomic_path(options.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    sys.stdout.write(f"{os.path.abspath(options.out)} ({len(text) / 2**20:.1f} MiB)\n")


def page(runs: list[Run]) -> str:
    """The page, which needs nothing but itself. Only its own scripts run: what a model has written is data, and the
    page's policy lets no other script in, nor anything from elsewhere."""
    from plotly.offline import get_plotlyjs  # megabytes, and only this needs it

    here, nonce = files("papo.report"), secrets.token_hex(16)
    parts = {
        "NONCE": nonce,
        "PLOTLY": get_plotlyjs(),
        "STYLE": here.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": here.joinpath("page.js").read_text(encoding="utf-8"),
        "DATA": as_data({"runs": [asdict(run) for run in runs], "groups": charts(runs)}),
    }
    pieces = here.joinpath("page.html").read_text(encoding="utf-8").split("@@")  # names stand at odd places
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def as_data(value: Any) -> str:
    """JSON inside a script element: with no `<`, nothing in it can end the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
