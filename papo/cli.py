"""The command `papo`: small tools around a training run, one sub-command each."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from papo.evaluation.command import add_eval
from papo.plugin import register
from papo.report.command import add_report
from papo.tools.compare import add_compare
from papo.tools.data_check.command import add_data
from papo.tools.doctor.command import add_doctor
from papo.tools.export.command import add_export
from verl.config.algorithm import ViewConfig, ViewStage
from verl.config.data import DataConfig
from verl.config.keys import as_markdown, as_text, nearest, reference
from verl.config.option import check_options
from verl.data.thumbnails import side_by_side
from verl.data.views import VIEW_CONFIGS, transform
from verl.legacy.translate import translate
from verl.utils.files import atomic_path
from verl.utils.process import LOG_FORMAT


def main(arguments: list[str] | None = None) -> None:
    """Run one sub-command. Exits with 1 and a line that says why where what it was given is at fault."""
    if "random_patch" not in VIEW_CONFIGS:  # nothing has loaded the plugins
        register()
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # argparse finds key=value only right behind IMAGE; behind an option they are left over.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unknown: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The command line. A sub-command is one function here that adds it, and the function that it runs."""
    top = argparse.ArgumentParser(prog="papo", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_mask(commands)
    add_convert_config(commands)
    add_keys(commands)
    add_doctor(commands)
    add_export(commands)
    add_data(commands)
    add_compare(commands)
    add_eval(commands)
    add_report(commands)
    return top


def add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("train", help="train from a preset: papo train NAME key=value ...")
    command.description = (
        "The short form of `python -m verl.trainer.main --config-name NAME ...`, with all that it takes."
    )
    command.add_argument("preset", metavar="NAME")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="key=value, --dry-run, ...")
    command.set_defaults(run=train)


def train(options: argparse.Namespace) -> None:
    """Train as the trainer's own command does."""
    from verl.trainer.main import main as trainer

    trainer(["--config-name", options.preset, *options.arguments])


def add_mask(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("mask", help="show what a masking strategy does to a picture")
    command.add_argument("image", metavar="IMAGE")
    command.add_argument(
        "--strategy", default="random_patch", help=f"one of: {', '.join(VIEW_CONFIGS)} (default: %(default)s)"
    )
    command.add_argument("--out", metavar="PATH", help="default: IMAGE_masked.png, next to IMAGE")
    command.add_argument("--seed", type=int, default=1, help="of the mask (default: %(default)s)")
    command.add_argument("--model", metavar="MODEL", help="whose image size stage=resized means; a folder or hub name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the strategy, as in algorithm.views")
    command.set_defaults(run=mask)


def mask(options: argparse.Namespace) -> None:
    """Write the picture and its masked view side by side."""
    from verl.data.images import open_image
    from verl.data.vision import VisionProcessor  # transformers takes seconds, --help should not

    config = strategy_config(options.strategy, options.overrides)
    image = open_image(options.image, None)
    if config.stage == ViewStage.resized:
        if options.model is None:
            raise ValueError("stage=resized needs --model, whose image processor decides the size")
        limits = DataConfig()
        image = VisionProcessor(options.model, limits.min_pixels, limits.max_pixels).resize(image)
    masked = transform(image, config, options.seed)
    out = options.out or f"{os.path.splitext(options.image)[0]}_masked.png"
    with atomic_path(out) as temporary:
        side_by_side([image, masked]).save(temporary, format="PNG")
    sys.stdout.write(f"{out}\n")


def strategy_config(strategy: str, overrides: list[str]) -> ViewConfig:
    """The checked options of `strategy` from key=value texts. Raises ValueError naming what is at fault."""
    config_class = VIEW_CONFIGS[strategy]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"'{override}' is no key=value")
    try:
        raw = OmegaConf.merge(OmegaConf.structured(config_class), OmegaConf.from_dotlist(overrides))
        missing = sorted(OmegaConf.missing_keys(raw))
        if missing:
            raise ValueError(f"{strategy} needs {', '.join(f'{key}=...' for key in missing)}")
        config = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        known = ", ".join(key for key in OmegaConf.structured(config_class) if key != "kind")
        raise ValueError(
            f"{strategy} with {' '.join(overrides)}: {error.msg.splitlines()[0]}; its options: {known}"
        ) from error
    check_options(config, strategy)
    if config.kind != strategy or config.column:
        raise ValueError("kind is given by --strategy, and column needs a dataset: neither can be an option here")
    return config


def add_keys(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("keys", help="print every config key with its default, values and meaning")
    command.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="such as worker.rollout")
    command.add_argument("--markdown", action="store_true", help="as the page configs/KEYS.md")
    command.set_defaults(run=keys)


def keys(options: argparse.Namespace) -> None:
    """Write the reference of all keys, or of those that begin with a prefix."""
    found = reference(options.prefix)
    if not found:
        sections = sorted({key.key.rpartition(".")[0] for key in reference()})
        raise ValueError(f"no key begins with '{options.prefix}': {nearest(options.prefix, sections)}")
    sys.stdout.write(as_markdown(found) if options.markdown else as_text(found))


def add_convert_config(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "convert-config", help="print a config of EasyR1 or PAPO as a preset of this framework"
    )
    command.add_argument("config", metavar="OLD.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="as behind config=OLD.yaml")
    command.set_defaults(run=convert_config)


def convert_config(options: argparse.Namespace) -> None:
    """Write the preset to the standard output, and what became of each key to the log."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    preset, rest = translate(options.config, options.overrides)
    if rest:
        raise ValueError(f"{' '.join(rest)}: a preset cannot hold these; give them to the run")
    sys.stdout.write(f"# Converted by: papo convert-config {' '.join([options.config, *options.overrides])}\n")
    sys.stdout.write(preset.to_yaml())


if __name__ == "__main__":
    main()
