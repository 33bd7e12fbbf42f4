"""PromptRows: the rows of files as the config reads them, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError
from PIL.Image import Image

from verl.config.data import DataConfig
from verl.data.dialogue import Dialogue
from verl.data.files import open_rows
from verl.data.images import open_image

IMAGE_MARKER = "<image>"
VIDEO_COLUMN = "videos"


class PromptRows:
    """The rows that `key` names by `reference`.

    Args:
        view_columns: further columns of pictures, as many in a row as its images, that views read.

    Raises:
        ValueError, FileNotFoundError: naming the config key and the file.
    """

    def __init__(self, reference: str, key: str, config: DataConfig, view_columns: Sequence[str] = ()) -> None:
        self.config = config
        self.view_columns = tuple(view_columns)
        required = dict.fromkeys(view_columns, "which the option `column` of a view in algorithm.views names")
        required |= {config.answer_key: "data.answer_key", config.prompt_key: "data.prompt_key"}
        opened = open_rows(reference, key, required, (config.image_key, VIDEO_COLUMN))
        self.dataset, self.sources, self.origin = opened.dataset, opened.sources, opened.origin
        self.table = opened.dataset.data
        self.template = load_template(config.format_prompt)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def batch(self, start: int, stop: int) -> list[dict[str, Any]]:
        """The rows from `start` to before `stop`, much faster than one by one."""
        columns = self.dataset[start:stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def images_of(self, row: dict[str, Any], column: str | None = None) -> list[Any]:
        """The row's images in `column` (by default data.image_key), undecoded; a single image counts as a list."""
        images = row.get(column or self.config.image_key)
        if images is None:
            return []
        return images if isinstance(images, list) else [images]

    def pictures(self, row: dict[str, Any], column: str | None = None) -> list[Image]:
        """The row's images in `column`, as RGB pictures. Raises as `open_image` does."""
        return [open_image(image, self.config.image_dir) for image in self.images_of(row, column)]

    def prompt_text(self, row: dict[str, Any]) -> str:
        """The prompt: the problem, set into the template where there is one. Of a prompt that is messages, the template
        is around the last one; see `Dialogue`."""
        problem = row[self.config.prompt_key]
        if isinstance(problem, str):
            return self._in_template(problem)
        *before, last = ((message["role"], message["content"]) for message in problem)
        return Dialogue([*before, (last[0], self._in_template(last[1]))])

    def _in_template(self, text: str) -> str:
        return self.template.render(content=text) if self.template else text

    def uid(self, index: int) -> str:
        """The name of the row `index`: its file and place."""
        name, number = self.origin(index)
        return f"{name}:{number}"

    def where(self, index: int) -> str:
        """File and row of the row `index`, for errors."""
        name, number = self.origin(index)
        return f"'{name}', row {number}"


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
