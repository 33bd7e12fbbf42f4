"""`data.*`: where rows come from and how they become prompts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from omegaconf import II

from verl.config.option import option


class PromptTruncation(StrEnum):
    """Treatment of a prompt longer than `max_prompt_length`."""

    error = "error"
    drop = "drop"
    left = "left"


@dataclass
class DataConfig:
    """The training and validation data."""

    train_files: str | None = option(
        None,
        "parquet, JSON, JSONL or Arrow files, folders of them, or hub names, `path@split`, comma-separated; `path*0.5` "
        "takes half of its rows in an epoch, other ones in each, `path*2` all of them twice",
    )
    val_files: str | None = option(
        None, "as train_files, without weights; of several, each is reported too (val/FILE/accuracy)"
    )
    prompt_key: str = option("problem", "column of the problem")
    answer_key: str = option("answer", "column of the ground truth")
    image_key: str = option("images", "column of the images")
    image_dir: str | None = option(None, "folder in which relative image paths are looked up")
    format_prompt: str | None = option(None, "Jinja template around the problem (`{{ content }}`)")
    max_prompt_length: int = option(4096, "longest prompt, tokens, images included", above=0)
    max_response_length: int = option(2048, "longest response, tokens", above=0)
    filter_overlong_prompts: bool = option(True, "count every prompt's tokens before the run")
    filter_overlong_prompts_workers: int | None = option(None, "processes for that; null: one per core", least=1)
    truncation: PromptTruncation | None = option(
        None,
        "fate of longer prompts: drop (the default with filter_overlong_prompts), error (without), left (cut text off "
        "its left end, never an image)",
    )
    rollout_batch_size: int = option(384, "prompts per step", above=0)
    mini_rollout_batch_size: int | None = option(
        None, "prompts per generation where algorithm.online_filtering needs several; null: rollout_batch_size", least=1
    )
    val_batch_size: int = option(256, "prompts per batch of a validation", above=0)
    min_pixels: int = option(200704, "least area of an image after resizing, pixels", above=0)
    max_pixels: int = option(1003520, "largest area of an image after resizing, pixels", above=0)
    shuffle: bool = option(True, "shuffle each epoch")
    num_workers: int = option(2, "processes that decode images; 0: the driver itself", least=0)
    seed: int = option(II("trainer.seed"), "seed of the order of rows")

    @property
    def overlong(self) -> PromptTruncation:
        """Treatment of prompts that are too long."""
        if self.truncation is not None:
            return self.truncation
        return PromptTruncation.drop if self.filter_overlong_prompts else PromptTruncation.error

    def check(self, key: str) -> None:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"{key}.min_pixels={self.min_pixels} is above {key}.max_pixels={self.max_pixels}")
        if self.overlong == PromptTruncation.drop and not self.filter_overlong_prompts:
            raise ValueError(f"{key}.truncation=drop needs {key}.filter_overlong_prompts=true, which finds those rows")
        if self.format_prompt and not os.path.isfile(self.format_prompt):
            path = os.path.abspath(self.format_prompt)
            raise FileNotFoundError(f"{key}.format_prompt='{path}': there is no such file")
        if self.image_dir and not os.path.isdir(self.image_dir):
            raise FileNotFoundError(f"{key}.image_dir='{os.path.abspath(self.image_dir)}': there is no such folder")
