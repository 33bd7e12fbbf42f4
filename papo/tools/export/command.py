"""`papo export`: a checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from papo.tools.export.card import model_card
from papo.tools.export.model import build_model, dtype_of, merge_adapter, upload, write_adapter, write_model
from papo.tools.export.source import Source, find_source
from verl.models.adapter_names import adapted_layers
from verl.utils.files import atomic_path
from verl.utils.process import LOG_FORMAT, quiet_libraries


def add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder with a model card")
    command.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run's folder, global_step_<N> or its actor folder"
    )
    command.add_argument("out", metavar="OUT", help="the new folder")
    command.add_argument("--dtype", default="bf16", help="of the weights: bf16, fp16, fp32 (default: %(default)s)")
    command.add_argument(
        "--best",
        nargs="?",
        const="",
        metavar="METRIC",
        help="of a run, the checkpoint where METRIC was highest (default: its trainer.save_best, or val/accuracy), "
        "not the latest",
    )
    command.add_argument(
        "--merge-lora",
        action="store_true",
        help="of a run with LoRA the whole model, the adapter merged; without it OUT is the adapter alone",
    )
    command.add_argument(
        "--push-to-hub", metavar="REPO", help="then upload OUT to this repository, private if it is new"
    )
    command.set_defaults(run=export)


def export(options: argparse.Namespace) -> None:
    """Write OUT, whole or not at all, and upload it where that is asked for."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    out = os.path.abspath(options.out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"'{out}' exists and is not empty: name another folder")
    source = find_source(options.source, options.best)
    write(
        source,
        out,
        options.dtype,
        options.merge_lora,
        os.path.basename(out) if options.push_to_hub is None else options.push_to_hub,
    )
    sys.stdout.write(f"{out}\n")
    if options.push_to_hub is not None:
        upload(out, options.push_to_hub)


def write(source: Source, out: str, dtype: str, merge_lora: bool, name: str) -> None:
    """Write the export, called `name` in its card, to `out`."""
    quiet_libraries()
    wanted = dtype_of(dtype)
    weights = source.weights(wanted)
    adapted = bool(adapted_layers(weights))
    if merge_lora and not adapted:
        raise ValueError(
            f"--merge-lora: '{source.actor}' has no adapter, all of its weights were trained; leave it out"
        )
    alone = adapted and not merge_lora
    model = None if alone else build_model(source.huggingface, merge_adapter(weights, source), wanted)
    card = model_card(source, name, str(wanted).removeprefix("torch."), alone)
    with atomic_path(out) as temporary:
        if model is None:
            write_adapter(weights, source, wanted, temporary)
        else:
            write_model(model, source.huggingface, temporary)
        with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)
