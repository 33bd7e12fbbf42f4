"""The command: which checks run, in which order, and what its exit code says. Imports nothing that may be broken."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from papo.tools.doctor.case import GIB, GPU, Case, Finding, Level, error, in_short, warning

if TYPE_CHECKING:
    from verl.config.config import Config

# (heading, "module:function" of each check). Checks are imported when they run: one that cannot says so.
MACHINE = (
    (
        "installation",
        ("packages:check_python", "packages:check_pins", "packages:check_conflicts", "packages:check_imports"),
    ),
    (
        "machine",
        (
            "machine:check_gpus",
            "machine:check_compiler",
            "packages:check_engines",
            "machine:check_memory",
            "machine:check_shared_memory",
            "machine:check_open_files",
            "machine:check_disk",
            "machine:check_ray",
        ),
    ),
)
RUN = (
    ("run", ("run:check_config", "run:check_devices", "run:check_reward")),
    ("model and data", ("run:check_model", "run:check_adapter", "run:check_output", "run:check_data")),
    ("memory", ("fit:check_memory_fit", "fit:check_images_of_step")),
)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command to `papo`."""
    command = commands.add_parser("doctor", help="say what will not work, of this machine and of a run")
    add_options(command)
    command.set_defaults(run=doctor)


def add_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Checks the installation and this machine and, with --config-name, everything that a run would use: its keys, "
        "model, data, reward and memory. Exit code 1 if it would not work."
    )
    command.add_argument("--config-name", metavar="NAME", help="the preset of a run, as for verl.trainer.main")
    command.add_argument("--config-dir", metavar="DIR", help="a folder of presets of your own")
    command.add_argument("--gpus", type=int, metavar="N", help="GPUs per node of a machine that one is not on")
    command.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each of them")
    command.add_argument(
        "--dry-run", action="store_true", help="then, if all is well, send the largest legal sample through everything"
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of the preset")


def doctor(options: argparse.Namespace) -> None:
    """Run the checks and write what they found; exits with 1 if one found an error."""
    from papo.tools.doctor.report import as_json, as_text

    warnings.filterwarnings("ignore")
    case, sections = make_case(options), {}
    if options.config_name:
        try:
            case.config = compose(options)
        except Exception as reason:  # of a config, or of an installation that the checks below look into
            known = isinstance(reason, (ValueError, FileNotFoundError))
            sections["run"] = [error("config", str(reason) if known else in_short(reason))]
    sections = dict(run_checks(case, MACHINE + RUN if case.config else MACHINE)) | sections
    if options.json:
        sys.stdout.write(json.dumps(as_json(sections, case.estimate), indent=2) + "\n")
    else:
        sys.stdout.write(as_text(sections, case.estimate))
    if any(finding.level == Level.error for found in sections.values() for finding in found):
        sys.exit(1)
    if options.dry_run:
        from verl.trainer import main

        main.main(
            ["--dry-run", "--config-name", options.config_name, "--config-dir", config_dir(options), *options.overrides]
        )


def make_case(options: argparse.Namespace) -> Case:
    """The machine, or the one that was asked about. Raises ValueError for options that do not go together."""
    from papo.tools.doctor.machine import find_gpus

    if (options.gpus is None) != (options.gpu_memory is None):
        raise ValueError("--gpus N and --gpu-memory GIB go together")
    for given in (*options.overrides, *["--dry-run"] * options.dry_run):
        if not options.config_name:
            raise ValueError(f"{given} needs --config-name")
    if options.gpus is None:
        return Case(find_gpus())
    if options.gpus < 1 or options.gpu_memory <= 0:
        raise ValueError("--gpus and --gpu-memory: values above 0 are needed")
    memory = int(options.gpu_memory * GIB)
    return Case([GPU("a GPU", memory, memory)] * options.gpus, imagined=True)


def compose(options: argparse.Namespace) -> Config:
    """The config of the run."""
    from verl.config.compose import compose_config
    from verl.utils.process import quiet_libraries

    quiet_libraries()
    return compose_config(options.config_name, options.overrides, config_dir(options))


def config_dir(options: argparse.Namespace) -> str:
    from verl.config.compose import CONFIG_DIR

    return options.config_dir or CONFIG_DIR


def run_checks(case: Case, sections: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[tuple[str, list[Finding]]]:
    """(heading, findings) of each section. A check that fails itself is a finding, and the others still run."""
    said: list[str] = []
    for heading, checks in sections:
        found: list[Finding] = []
        for check in checks:
            module, _, name = check.partition(":")
            try:
                found += getattr(importlib.import_module(f"papo.tools.doctor.{module}"), name)(case)
            except Exception as reason:
                found.append(_unchecked(name.removeprefix("check_").replace("_", " "), reason, said))
            said += [finding.text for finding in found]
        yield heading, found


def _unchecked(topic: str, reason: Exception, said: list[str]) -> Finding:
    """The finding of a check that raised: a fault of its own, or what another check has said already."""
    if any(str(reason).splitlines()[:1] == text.splitlines()[:1] for text in said):
        return warning(topic, "not checked, because of an error above", "mend that first")
    return error(topic, f"could not be checked ({in_short(reason)})", "mend the errors above first")
