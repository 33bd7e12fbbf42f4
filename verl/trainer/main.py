"""Entry point: python -m verl.trainer.main --config-name NAME key=value ...

Command lines of EasyR1 and PAPO (config=FILE.yaml key=value ...) are translated: verl/legacy/translate.py.
"""

from __future__ import annotations

import argparse
import logging
import sys

from omegaconf import OmegaConf

from verl.config.compose import CONFIG_DIR, compose_config, presets
from verl.config.config import Config
from verl.legacy.translate import MARK, compose_legacy, translate_overrides
from verl.utils.process import LOG_FORMAT, quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Compose the config, check it, and train. Exits with 1 where the config, or a file it names, is at fault."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    logging.getLogger("verl").setLevel(logging.INFO)
    options = parse(arguments)
    quiet_libraries()
    try:
        config = compose(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if options.print_config:
        sys.stdout.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return
    from verl.trainer.launch import launch  # with all that it takes to train: seconds

    launch(config, options.dry_run)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m verl.trainer.main", description="Train from a preset.")
    parser.add_argument("--config-name", metavar="NAME", help=f"one of: {', '.join(presets())}")
    parser.add_argument("--config-dir", default=CONFIG_DIR, metavar="DIR", help="a folder of presets of your own")
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="send the largest legal sample through everything once, say what it took, and stop",
    )
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


if __name__ == "__main__":
    main()
