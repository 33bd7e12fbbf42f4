"""EasyR1's merger: `model_merger.py --local_dir .../global_step_N/actor [--hf_upload_path REPO]`."""

from __future__ import annotations

import argparse
import logging
import sys

from papo.tools.export.model import add_weights, build_model, dtype_of, merge_adapter, upload
from papo.tools.export.source import find_source
from verl.utils.process import LOG_FORMAT, quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Merge the shards in --local_dir into its folder huggingface. Exits with 1 and a line that says why not."""
    parser = argparse.ArgumentParser(description="merge a checkpoint's shards into its folder huggingface")
    parser.add_argument("--local_dir", required=True, help="the folder actor of a checkpoint of EasyR1 or of ours")
    parser.add_argument("--hf_upload_path", default=None, metavar="REPO", help="also upload the folder to this repo")
    parser.add_argument("--dtype", default="bf16", help="of the merged weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    quiet_libraries()
    try:
        merge(options.local_dir, options.dtype, options.hf_upload_path)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def merge(local_dir: str, dtype: str, repo: str | None) -> None:
    """Write the merged weights beside the config in `local_dir`/huggingface, and upload that folder to `repo`."""
    source, wanted = find_source(local_dir), dtype_of(dtype)
    model = build_model(source.huggingface, merge_adapter(source.weights(wanted), source), wanted)
    # Of our own checkpoints the manifest lists every file as it was: none of them may change.
    add_weights(model, source.huggingface, config_too=source.easyr1)
    sys.stdout.write(f"{source.huggingface}\n")
    if repo is not None:
        upload(source.huggingface, repo)
