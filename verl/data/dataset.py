"""PromptDataset: rows of files as prompts that a model can read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined, TemplateError
from PIL.Image import Image
from torch.utils.data import Dataset

from verl.config.data import DataConfig
from verl.data.files import open_rows
from verl.data.overlong import filter_overlong
from verl.data.vision import VisionProcessor, open_image

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<image>"
VIDEO_COLUMN = "videos"


class PromptDataset(Dataset):
    """One item per row: `uid`, `problem`, `answer`, `images`, `view_images`, `prompt_ids`, `prompt_positions`,
    `mm_inputs`.

    All rows are checked when it is made (columns, `<image>` markers against images), so that a bad row stops
    the run at the start and not after hours.

    Args:
        view_columns: further columns of pictures, as many in a row as its images, that views read.

    Raises:
        ValueError, FileNotFoundError: naming the config key, the file and the row.
    """

    def __init__(
        self, reference: str, key: str, config: DataConfig, vision: VisionProcessor, view_columns: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.vision = vision
        self.view_columns = tuple(view_columns)
        self.rows = open_rows(reference, key, config.image_key, *view_columns)
        self._check_columns(key)
        self.template = load_template(config.format_prompt)
        self._check_rows()
        self.indices = list(range(len(self.rows.dataset)))
        if config.filter_overlong_prompts:
            self.indices = filter_overlong(self)
        logger.info("%s: %d prompts from %s", key, len(self), ", ".join(name for name, _ in self.rows.sources))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        row = self.rows.dataset[index]
        try:
            images = self.pictures(row, self.config.image_key)
            view_images = {column: self.pictures(row, column) for column in self.view_columns}
            problem = self.prompt_text(row)
            encoded = self.vision.encode_prompt(self.vision.chat_text(problem), images)
        except (ValueError, FileNotFoundError, TemplateError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from error
        length = len(encoded["prompt_ids"])
        if length > self.config.max_prompt_length:
            raise ValueError(
                f"{self.where(index)}: the prompt has {length} tokens, more than data.max_prompt_length="
                f"{self.config.max_prompt_length} (images of {[image.size for image in images]} pixels); raise it, "
                "lower data.max_pixels, or drop such rows with data.filter_overlong_prompts=true"
            )
        name, number = self.rows.origin(index)
        answer = str(row[self.config.answer_key])
        return {
            "uid": f"{name}:{number}",
            "problem": problem,
            "answer": answer,
            "images": images,
            "view_images": view_images,
            **encoded,
        }

    def pictures(self, row: dict[str, Any], column: str) -> list[Image]:
        """The row's images in `column`, as RGB pictures."""
        return [open_image(image, self.config.image_dir) for image in self.images_of(row, column)]

    def images_of(self, row: dict[str, Any], column: str | None = None) -> list[Any]:
        """The row's images in `column` (by default data.image_key), undecoded; a single image counts as a list."""
        images = row.get(column or self.config.image_key)
        if images is None:
            return []
        return images if isinstance(images, list) else [images]

    def prompt_text(self, row: dict[str, Any]) -> str:
        """The user's message: the problem, set into the template where there is one."""
        problem = row[self.config.prompt_key]
        return self.template.render(content=problem) if self.template else problem

    def where(self, index: int) -> str:
        """File and row of the row `index`, for errors."""
        name, number = self.rows.origin(index)
        return f"'{name}', row {number}"

    def _check_columns(self, key: str) -> None:
        columns = self.rows.dataset.column_names
        for option in ("prompt_key", "answer_key"):
            column = getattr(self.config, option)
            if column not in columns:
                raise ValueError(
                    f"{key}: no column '{column}' (data.{option}) in {self.rows.sources[0][0]}; columns: {columns}"
                )
        for column in self.view_columns:
            if column not in columns:
                raise ValueError(
                    f"{key}: no column '{column}', which the option `column` of a view in algorithm.views names, in "
                    f"{self.rows.sources[0][0]}; columns: {columns}"
                )

    def _check_rows(self) -> None:
        """Texts, answers, and markers against images, of every row, without decoding an image."""
        # The arrow table is read column by column; a filter or shuffle would be lost, and there is none yet.
        table = self.rows.dataset.data
        problems = table.column(self.config.prompt_key)
        answers = pc.is_valid(table.column(self.config.answer_key)).to_pylist()
        if not all(answers):
            raise ValueError(f"{self.where(answers.index(False))}: column '{self.config.answer_key}' is empty")
        counts = count_images(table, self.config.image_key)
        self._check_media(table, counts)
        for column in self.view_columns:
            for index, (count, wanted) in enumerate(zip(count_images(table, column), counts, strict=True)):
                if count != wanted:
                    raise ValueError(
                        f"{self.where(index)}: {count} image(s) in column '{column}', which a view reads, and {wanted} "
                        f"in column '{self.config.image_key}'; they must agree"
                    )
        for index, (problem, count) in enumerate(zip(problems.to_pylist(), counts, strict=True)):
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError(f"{self.where(index)}: column '{self.config.prompt_key}' is empty or no text")
            markers = problem.count(IMAGE_MARKER)
            if markers != count:
                raise ValueError(
                    f"{self.where(index)}: the problem has {markers} {IMAGE_MARKER} marker(s) and the row has "
                    f"{count} image(s) in column '{self.config.image_key}'; they must agree"
                )

    def _check_media(self, table: pa.Table, counts: list[int]) -> None:
        """What the model cannot see. `counts`: images of each row."""
        videos = count_images(table, VIDEO_COLUMN)
        if any(videos):
            index = next(i for i, count in enumerate(videos) if count)
            raise ValueError(
                f"{self.where(index)}: {videos[index]} video(s) in column '{VIDEO_COLUMN}'; prompts are made of text "
                f"and images alone: leave such rows out, or give frames as images in '{self.config.image_key}'"
            )
        if any(counts) and not self.vision.family.has_vision:
            index = next(i for i, count in enumerate(counts) if count)
            raise ValueError(
                f"{self.where(index)}: {counts[index]} image(s) in column '{self.config.image_key}', and "
                f"worker.actor.model.model_path holds a {self.vision.family.name} model, which reads text only: choose "
                "a vision model, or leave such rows out"
            )


def count_images(table: pa.Table, column: str) -> list[int]:
    """How many images each row has in `column`; none where there is no such column."""
    if column not in table.column_names:
        return [0] * len(table)
    images = table.column(column)
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        return pc.fill_null(pc.list_value_length(images), 0).to_pylist()
    return [int(valid) for valid in pc.is_valid(images).to_pylist()]


def load_template(path: str | None) -> Any:
    """The Jinja template at `path`, or None. Raises ValueError where it is no template or ignores `content`."""
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        source = file.read()
    try:
        template = Environment(undefined=StrictUndefined).from_string(source.strip())
        probe = template.render(content="PROBE <image>")
    except TemplateError as error:
        raise ValueError(f"data.format_prompt='{path}' is not a valid template: {error}") from error
    if "PROBE <image>" not in probe:
        raise ValueError(f"data.format_prompt='{path}' does not print the problem: it needs {{{{ content }}}}")
    return template
