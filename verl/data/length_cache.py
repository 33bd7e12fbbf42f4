"""Prompt lengths from one run to the next, for as long as nothing they depend on has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from datasets import config as datasets_config

from verl.data.rows import PromptRows
from verl.data.vision import VisionProcessor
from verl.utils.files import atomic_path

logger = logging.getLogger(__name__)

VERSION = 1  # of how lengths are counted


def load_lengths(path: str, num_rows: int) -> np.ndarray | None:
    """[num_rows] int32, or None where they are not known; a cache file that is broken is said."""
    if not os.path.exists(path):
        return None
    try:
        lengths = np.load(path, allow_pickle=False)
        if lengths.shape != (num_rows,) or lengths.dtype != np.int32 or (lengths <= 0).any():
            raise ValueError(f"it holds {lengths.dtype} {lengths.shape}, and there are {num_rows} rows")
    except (OSError, ValueError, EOFError) as error:
        logger.warning("the cache of prompt lengths '%s' is broken and is made anew: %s", path, error)
        return None
    logger.info("prompt lengths come from '%s'", path)
    return lengths


def save_lengths(path: str, lengths: np.ndarray) -> None:
    """Keep `lengths` for `load_lengths`; where that is not possible, a warning says so."""
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, lengths)
    except OSError as error:
        logger.warning("prompt lengths cannot be kept for the next run: %s", error)


def cache_path(rows: PromptRows, vision: VisionProcessor) -> str:
    """A path beside the data that `datasets` keeps (HF_DATASETS_CACHE chooses where), named by all that lengths depend
    on."""
    config = rows.config
    template = ""
    if config.format_prompt:
        with open(config.format_prompt, encoding="utf-8") as file:
            template = file.read()
    images = vision.image_processor.to_dict() if vision.family.has_vision else {}
    depends_on = [
        [VERSION, transformers.__version__, config.prompt_key, config.image_key, template],
        [source.identity for source in rows.sources],
        [vision.processor.chat_template, vision.tokenizer.backend_tokenizer.to_str(), images],
        getattr(vision.processor, "image_seq_length", None),
        list(_image_files(rows)),
    ]
    digest = hashlib.sha256(json.dumps(depends_on, default=str).encode()).hexdigest()
    return os.path.join(datasets_config.HF_DATASETS_CACHE, "prompt_lengths", f"{digest}.npy")


def _image_files(rows: PromptRows) -> Iterator[str]:
    """Path, size and time of each image that is a file of its own: it may change while the rows do not."""
    if rows.config.image_key not in rows.table.column_names:
        return
    images = rows.table.column(rows.config.image_key)
    while pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        images = pc.list_flatten(images)
    if pa.types.is_struct(images.type) and {"bytes", "path"} <= {field.name for field in images.type}:
        images = pc.filter(pc.struct_field(images, "path"), pc.is_null(pc.struct_field(images, "bytes")))
    if pa.types.is_string(images.type) or pa.types.is_large_string(images.type):
        for path in pc.unique(images.drop_null()).to_pylist():
            path = os.path.join(rows.config.image_dir or "", path)
            try:
                state = os.stat(path)
            except (OSError, ValueError):  # base64, or missing, which the count will say
                continue
            yield f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"
