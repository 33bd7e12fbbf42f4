"""The command: opens the files as a run would, looks at every row, and says what it found. Exit code 1 for errors."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from papo.tools.data_check import BadRow
from verl.config.data import DataConfig, PromptTruncation
from verl.config.option import check_options
from verl.utils.files import atomic_path
from verl.utils.process import LOG_FORMAT, quiet_libraries

if TYPE_CHECKING:  # transformers takes seconds, --help should not
    from papo.tools.data_check.look import Look
    from verl.data.rows import PromptRows

BAD_ROWS, HISTOGRAM = "bad_rows.jsonl", "prompt_lengths.png"


def add_data(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command to `papo`."""
    tools = commands.add_parser("data", help="check files of prompts").add_subparsers(required=True, metavar="COMMAND")
    command = tools.add_parser("check", help="say which rows a run could not use")
    command.description = (
        "Opens FILES as data.train_files would and looks at every row: columns, <image> markers against images, images "
        "that cannot be read, empty or doubtful answers, duplicates and, with --model, prompt lengths. Writes "
        f"{BAD_ROWS} and {HISTOGRAM}; exit code 1 if a run would stop at a row."
    )
    command.add_argument("files", metavar="FILES", help="as data.train_files: a,b@split,c*0.5")
    command.add_argument("--model", metavar="MODEL", help="whose tokens to count; a folder or hub name")
    command.add_argument("--headers", action="store_true", help="read the headers of images and do not decode them")
    command.add_argument("--out", metavar="DIR", default="outputs/data_check", help="default: %(default)s")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of data.*, as for a run")
    command.set_defaults(run=check)


def check(options: argparse.Namespace) -> None:
    """Run the checks and write what they found; exits with 1 if a row is at fault."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    quiet_libraries()
    from papo.tools.data_check.look import look_at
    from papo.tools.data_check.report import draw, report
    from verl.data.checks import row_faults
    from verl.data.rows import PromptRows
    from verl.data.scan import scan
    from verl.data.vision import VisionProcessor

    config = data_config(options.overrides)
    rows = PromptRows(options.files, "FILES", config)
    vision = VisionProcessor(options.model, config.min_pixels, config.max_pixels) if options.model else None
    faults = list(row_faults(rows, vision))
    look = partial(look_at, rows, vision, not options.headers, {fault.index for fault in faults})
    looks = list(scan(rows, look, "looking at rows", config.filter_overlong_prompts_workers))
    bad = [BadRow(*rows.origin(f.index), "error", f.kind, f.text) for f in faults]
    bad += [BadRow(*rows.origin(f.index), "error", f.kind, f.text) for f in (k.fault for k in looks) if f is not None]
    bad += doubtful(rows, looks) + overlong(rows, looks)
    path = os.path.join(options.out, BAD_ROWS)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(asdict(row), ensure_ascii=False)}\n" for row in bad)
    sys.stdout.write(report(rows, looks, bad))
    lengths = [found.tokens for found in looks if found.tokens is not None]
    if lengths:
        picture = os.path.join(options.out, HISTOGRAM)
        draw(lengths, config.max_prompt_length, picture)
        sys.stdout.write(f"{picture}\n")
    sys.stdout.write(f"{path}\n")
    if any(row.level == "error" for row in bad):
        sys.exit(1)


def data_config(overrides: list[str]) -> DataConfig:
    """The checked `data.*` of `overrides`, which may leave out `data.`. Raises ValueError naming what is at fault."""
    words = [word.removeprefix("data.") for word in overrides]
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise ValueError(f"'{wrong[0]}' is no key=value; several files are one word, separated by commas")
    try:
        raw = OmegaConf.merge(OmegaConf.structured(DataConfig(seed=1)), OmegaConf.from_dotlist(words))
        config = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(DataConfig))
        raise ValueError(f"{' '.join(overrides)}: {error.msg.splitlines()[0]}; keys are {known}") from error
    check_options(config, "data")
    return config


def doubtful(rows: PromptRows, looks: list[Look]) -> list[BadRow]:
    """Answers that may never be found right, and rows that have come before."""
    found, first = [], {}
    for look in looks:
        if look.doubt:
            found.append(BadRow(*rows.origin(look.index), "warning", "answer", look.doubt))
        if look.content in first:
            text = f"the same problem, answer and images as {rows.where(first[look.content])}"
            found.append(BadRow(*rows.origin(look.index), "warning", "duplicate", text))
        first.setdefault(look.content, look.index)
    return found


def overlong(rows: PromptRows, looks: list[Look]) -> list[BadRow]:
    """Prompts that a run would drop or cut (a warning), or stop at."""
    limit, fate = rows.config.max_prompt_length, rows.config.overlong
    fates = {PromptTruncation.drop: "dropped", PromptTruncation.left: "cut", PromptTruncation.error: "refused"}
    level = "error" if fate == PromptTruncation.error else "warning"
    return [
        BadRow(
            *rows.origin(look.index),
            level,
            "length",
            f"{look.tokens} tokens, more than data.max_prompt_length={limit}: {fates[fate]}",
        )
        for look in looks
        if look.tokens is not None and look.tokens > limit
    ]
