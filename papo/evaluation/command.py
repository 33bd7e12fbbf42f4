"""`papo eval`: models on a suite of data sets, with and without the image."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from papo.evaluation.models import Model, find_models
from papo.evaluation.records import Records
from papo.evaluation.report import compare, export_vlmevalkit, summarize, tables, write_json
from papo.evaluation.suite import AS_TRAINED, PROTOCOLS, Suite, as_overrides, load_suite
from verl.utils.files import atomic_path
from verl.utils.process import LOG_FORMAT, quiet_libraries

logger = logging.getLogger("papo.eval")


def add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("eval", help="evaluate models, and how much of their accuracy comes from the image")
    command.description = (
        "Asks each MODEL every question of a suite n times, with the real images and under --views, and prints "
        "accuracy with 95 % intervals, what the image is worth, and paired differences to the first model. Each answer "
        "is written as it comes: after an interruption the same command goes on."
    )
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a Hugging Face folder or hub name, a run, a checkpoint (also EasyR1's), or NAME=one of these",
    )
    command.add_argument("--suite", default="digits", help="one of configs/suites, or a FILE.yaml (default: digits)")
    command.add_argument(
        "--data", type=Path, metavar="FOLDER", help="read sets from here that have a file in it, SET.parquet or .json"
    )
    command.add_argument("--n", type=int, default=8, help="answers to each question (default: %(default)s)")
    command.add_argument("--greedy", action="store_true", help="one answer, of the likeliest tokens")
    command.add_argument(
        "--protocol",
        default="suite",
        choices=[*PROTOCOLS, "train"],
        help="papo-eval: sampling, pixels and rule of PAPO-Eval; train: as each run validated (default: suite)",
    )
    command.add_argument(
        "--views", default="", metavar="VIEW,...", help="also ask under these: blank, random_patch, NAME=random_patch"
    )
    command.add_argument("--engine", default="auto", help="vllm, hf, or auto: vllm where it is installed")
    command.add_argument(
        "--base-url", metavar="URL", help="of an OpenAI-compatible server, with /v1; MODEL is then its name there"
    )
    command.add_argument("--concurrency", type=int, default=32, help="requests to it at one time (default: 32)")
    command.add_argument("--timeout", type=float, default=600, help="seconds for one of them (default: 600)")
    command.add_argument("--out", type=Path, default=Path("outputs/eval"), help="(default: %(default)s)")
    command.add_argument("--export", choices=["vlmevalkit"], help="also write prediction files for it")
    command.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="config keys, such as algorithm.views.blank.value=0"
    )
    command.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate every model and print the tables. Raises ValueError or FileNotFoundError naming what is at fault."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    for name in ("verl", "papo"):
        logging.getLogger(name).setLevel(logging.INFO)
    quiet_libraries()
    if options.n < 1:
        raise ValueError(f"--n {options.n}: at least 1")
    suite, models, views = (
        load_suite(options.suite),
        find_models(options.models, local=not options.base_url),
        views_of(options.views),
    )
    out = options.out / suite.name
    suite = (suite.within(options.data) if options.data else suite).with_rows(out / "data")
    answers = {model.name: answer(model, suite, views, options, out) for model in models}
    summaries = {name: summarize(suite, list(views), found) for name, found in answers.items()}
    differences = compare(suite, answers)
    for name, summary in summaries.items():
        write_json(out / name / "summary.json", summary)
        if options.export:
            for path in export_vlmevalkit(name, suite, answers[name], out / "vlmevalkit"):
                logger.info("%s", os.path.relpath(path))
    text = tables(summaries, differences, 1 if options.greedy else options.n)
    write_json(out / "results.json", {"models": summaries, "differences": differences})
    with atomic_path(str(out / "table.md")) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}\n{os.path.relpath(out)}\n")


def answer(model: Model, suite: Suite, views: dict[str, str], options: argparse.Namespace, out: Path) -> Records:
    """Ask `model` what it has not answered yet; returns all of its answers."""
    overrides = [*protocol(model, options.protocol), *sampling(options)]
    overrides += [f"+view@algorithm.views.{name}={kind}" for name, kind in views.items()]
    overrides += [f"worker.rollout.name={options.engine}", *options.set]
    settings = {
        "model": model.identity(),
        "overrides": overrides,
        "views": list(views),
        "server": bool(options.base_url),
    }
    settings["sets"] = [[one.name, one.data, one.settings] for one in suite.sets]
    if options.base_url:
        from papo.evaluation.server import Server, ServerEvaluation

        server = Server(options.base_url.rstrip("/"), model.path, options.concurrency, options.timeout)
        evaluation = ServerEvaluation(server, suite.sets, overrides, list(views))
        records = Records(out / model.name, settings)
        evaluation.run(records)
        return records
    from papo.evaluation.local import Evaluation, plan_of  # torch and transformers: seconds

    with model.folder(dtype_for_checkpoints()) as folder:
        path = as_overrides({"worker.actor.model.model_path": folder})
        plans = {one.name: plan_of(one, [*overrides, *path]) for one in suite.sets}
        records = Records(out / model.name, settings)
        logger.info("%s: %d set(s), answers in %s", model.name, len(plans), os.path.relpath(records.path))
        Evaluation(plans, list(views), records, out / "images").run()
    return records


def dtype_for_checkpoints() -> str:
    """The type in which this machine computes."""
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


def sampling(options: argparse.Namespace) -> list[str]:
    place = "worker.rollout.val_override_config"
    return [f"{place}.n=1", f"{place}.temperature=0"] if options.greedy else [f"{place}.n={options.n}"]


def protocol(model: Model, name: str) -> list[str]:
    """The overrides of a protocol. Raises ValueError where a model's run did not keep what `train` needs."""
    if name != "train":
        settings: dict[str, Any] = PROTOCOLS[name]
    else:
        config = model.source.config if model.source else {}
        if not config:
            raise ValueError(
                f"--protocol train: nobody kept how {model.path} was validated; give a run or a checkpoint of this "
                "framework"
            )
        settings = {key: _look_up(config, key) for key in AS_TRAINED}
    return as_overrides(settings)


def _look_up(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def views_of(text: str) -> dict[str, str]:
    """`blank,dark=random_patch` is {name: kind}. Raises ValueError."""
    found: dict[str, str] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, kind = part.rpartition("=")
        name = name or kind
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name in (*found, "original"):
            raise ValueError(f"--views {part}: give each view a name of its own, of letters and digits: NAME={kind}")
        found[name] = kind
    return found
