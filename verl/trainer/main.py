"""Entry point: python -m verl.trainer.main --config-name NAME key=value ...

Command lines of EasyR1 and PAPO (config=FILE.yaml key=value ...) are translated: verl/config/legacy.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from omegaconf import OmegaConf

from verl.checkpoint.tensors import SaveFailed
from verl.config.compose import CONFIG_DIR, compose_config, presets
from verl.config.config import Config
from verl.config.legacy import MARK, compose_legacy, translate_overrides
from verl.single_controller.preflight import ClusterError
from verl.trainer.plan import make_plan
from verl.trainer.ray_trainer import RayTrainer
from verl.trainer.resume import ResumeError
from verl.utils.process import LOG_FORMAT, quiet_libraries

logger = logging.getLogger("verl")


def main(arguments: list[str] | None = None) -> None:
    """Compose the config, check it, and train. Exits with 1 where the config, or a file it names, is at fault."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    logging.getLogger("verl").setLevel(logging.INFO)
    quiet_libraries()
    options = parse(arguments)
    try:
        config = compose(options)
        if options.print_config:
            sys.stdout.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
            return
        trainer = RayTrainer(make_plan(config))
    except (ValueError, FileNotFoundError) as error:
        logger.debug("where it was found", exc_info=True)
        sys.exit(f"error: {error}")
    try:
        summary = trainer.fit()
    except (ClusterError, ConnectionError, ResumeError, SaveFailed) as error:
        sys.exit(f"error: {error}")
    for line in describe(summary, trainer.run_dir.path):
        logger.info(line)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m verl.trainer.main", description="Train from a preset.")
    parser.add_argument("--config-name", metavar="NAME", help=f"one of: {', '.join(presets())}")
    parser.add_argument("--config-dir", default=CONFIG_DIR, metavar="DIR", help="a folder of presets of your own")
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"Hydra overrides of the preset; or {MARK}FILE.yaml, a config of EasyR1 or PAPO, and its overrides",
    )
    options = parser.parse_intermixed_args(arguments)
    files = [word.removeprefix(MARK) for word in options.overrides if word.startswith(MARK)]
    if len(files) + (options.config_name is not None) != 1:
        parser.error(f"what to run is named by one of --config-name NAME and {MARK}FILE.yaml")
    options.legacy_file = files[0] if files else None
    options.overrides = [word for word in options.overrides if not word.startswith(MARK)]
    return options


def compose(options: argparse.Namespace) -> Config:
    """The config that a command line describes, in this framework's words or in EasyR1's and PAPO's."""
    if options.legacy_file is not None:
        return compose_legacy(options.legacy_file, options.overrides)
    return compose_config(options.config_name, translate_overrides(options.overrides), options.config_dir)


def describe(summary: dict[str, float], run_dir: str) -> list[str]:
    """The end of a run in a few lines: what changed, and where everything is."""
    lines = [f"done: {summary['steps']} steps in {summary['seconds']:.0f} s"]
    before, after = summary.get("val_accuracy_before"), summary.get("val_accuracy_after")
    if before is not None and after is not None:
        lines.append(
            f"validation accuracy: {before:.1%} before, {after:.1%} after ({100 * (after - before):+.1f} points)"
        )
    for name, form in (("val_accuracy", ".1%"), ("val_reward", ".4f")):  # of a run that only validates
        if name in summary:
            lines.append(f"{name.replace('val_', 'validation ')}: {summary[name]:{form}}")
    names = ("summary.json", "curves.png", "metrics.jsonl", "samples.jsonl", "events.jsonl", "config.yaml")
    names += ("model", "checkpoints")
    found = [os.path.relpath(os.path.join(run_dir, n)) for n in names if os.path.exists(os.path.join(run_dir, n))]
    return [*lines, *(f"  {path}" for path in found)]


if __name__ == "__main__":
    main()
