"""PromptDataset: rows of files as prompts that a model can read."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from torch.utils.data import Dataset

from verl.config.data import DataConfig, PromptTruncation
from verl.config.option import check_options
from verl.data.checks import refuse, row_faults, sampled_image_faults
from verl.data.overlong import cut_left, filter_overlong, too_long
from verl.data.rows import PromptRows
from verl.data.vision import VisionProcessor

logger = logging.getLogger(__name__)


class PromptDataset(Dataset):
    """One item per row: `uid`, `problem`, `answer`, `images`, `view_images`, `prompt_ids`, `prompt_positions`,
    `mm_inputs`.

    All rows are checked when it is made (columns, answers, `<image>` markers against images, with
    `data.filter_overlong_prompts` the header of every image), and some images are decoded, so that a bad row stops the
    run at the start and not after hours.

    The items from `len` on are the same rows once more, with uids of their own: a file may have a weight above 1.

    Args:
        view_columns: further columns of pictures, as many in a row as its images, that views read.

    Raises:
        ValueError, FileNotFoundError: naming the config key, the file and the row.
    """

    def __init__(
        self, reference: str, key: str, config: DataConfig, vision: VisionProcessor, view_columns: Sequence[str] = ()
    ) -> None:
        check_options(config, "data")
        self.config = config
        self.vision = vision
        self.rows = PromptRows(reference, key, config, view_columns)
        refuse(self.rows, row_faults(self.rows, vision))
        if config.filter_overlong_prompts:
            self.indices = filter_overlong(self.rows, vision)
        else:
            self.indices = list(range(len(self.rows)))
            if config.overlong == PromptTruncation.left:
                logger.warning(
                    "data.truncation=left: longer prompts than data.max_prompt_length=%d will be cut, and data."
                    "filter_overlong_prompts=false does not count how many those are",
                    config.max_prompt_length,
                )
        refuse(self.rows, sampled_image_faults(self.rows, vision))
        names = ", ".join(source.name for source in self.rows.sources)
        logger.info("%s: %d prompts from %s", key, len(self), names)

    def __len__(self) -> int:
        return len(self.indices)

    def shares(self) -> list[tuple[float, list[int]]]:
        """(weight, items) of each file that has any left."""
        bounds = [0, *accumulate(source.num_rows for source in self.rows.sources)]
        shares = []
        for source, first, end in zip(self.rows.sources, bounds, bounds[1:], strict=False):
            items = range(bisect_left(self.indices, first), bisect_left(self.indices, end))
            if items:
                shares.append((source.weight, list(items)))
        return shares

    def uid(self, item: int) -> str:
        """The name of an item: its file and row, and which copy of the row it is."""
        copy, place = divmod(item, len(self))
        return self.rows.uid(self.indices[place]) + (f"#{copy}" if copy else "")

    def images_of(self, uid: str) -> list[Image]:
        """The pictures of the row with this `uid`."""
        name, _, number = uid.rpartition(":")
        index = int(number.partition("#")[0])
        for source in self.rows.sources:
            if source.name == name:
                return self.rows.pictures(self.rows[index])
            index += source.num_rows
        raise KeyError(uid)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item % len(self)]
        row = self.rows[index]
        try:
            images = self.rows.pictures(row)
            image_tokens = sum(self.vision.num_image_tokens(*image.size) for image in images)
            view_images = {column: self.rows.pictures(row, column) for column in self.rows.view_columns}
            if self.config.overlong == PromptTruncation.left:
                problem = cut_left(self.rows, self.vision, row, image_tokens)
            else:
                problem = self.rows.prompt_text(row)
            encoded = self.vision.encode_prompt(self.vision.chat_text(problem), images)
        except (ValueError, FileNotFoundError, TemplateError) as error:
            raise ValueError(f"{self.rows.where(index)}: {error}") from error
        length = len(encoded["prompt_ids"])
        if length > self.config.max_prompt_length:
            way_out = (
                f"its images of {[image.size for image in images]} pixels take {image_tokens}; raise it, lower "
                "data.max_pixels, or drop such rows with data.filter_overlong_prompts=true"
            )
            raise ValueError(f"{self.rows.where(index)}: {too_long(length, self.config.max_prompt_length, way_out)}")
        return {
            "uid": self.uid(item),
            "problem": str(problem),
            "answer": str(row[self.config.answer_key]),
            "images": images,
            "view_images": view_images,
            **encoded,
        }
