"""`data.*`: where rows come from and how they become prompts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import II


class PromptTruncation(StrEnum):
    """What becomes of a prompt longer than `max_prompt_length`: the run stops, the row is left out, or text is cut off
    its left end; images are never cut."""

    error = "error"
    drop = "drop"
    left = "left"


@dataclass
class DataConfig:
    """Files are parquet, JSON, JSONL or Arrow, folders of them, or names on the hub, `path@split`, comma-separated.
    `path*0.5` takes half of its rows in an epoch, other ones in each, `path*2` all of them twice.

    `rollout_batch_size` counts prompts per step, `mini_rollout_batch_size` prompts per generation where
    `algorithm.online_filtering` needs several (default: as many). Lengths are in tokens, `min_pixels` and
    `max_pixels` bound the area of an image after resizing. A relative image path is looked up in `image_dir`.

    `filter_overlong_prompts` counts every prompt's tokens before the run, in `filter_overlong_prompts_workers`
    processes (default: one per core). `truncation` is by default `drop` with that filter, and `error` without it.
    """

    train_files: str | None = None
    val_files: str | None = None
    prompt_key: str = "problem"
    answer_key: str = "answer"
    image_key: str = "images"
    image_dir: str | None = None
    format_prompt: str | None = None
    max_prompt_length: int = 4096
    max_response_length: int = 2048
    filter_overlong_prompts: bool = True
    filter_overlong_prompts_workers: int | None = None
    truncation: PromptTruncation | None = None
    rollout_batch_size: int = 384
    mini_rollout_batch_size: int | None = None
    val_batch_size: int = 256
    min_pixels: int = 200704
    max_pixels: int = 1003520
    shuffle: bool = True
    num_workers: int = 2
    seed: int = II("trainer.seed")

    @property
    def overlong(self) -> PromptTruncation:
        """What becomes of prompts that are too long."""
        if self.truncation is not None:
            return self.truncation
        return PromptTruncation.drop if self.filter_overlong_prompts else PromptTruncation.error

    def check(self) -> None:
        """Raise ValueError for values that do not go together."""
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels={self.min_pixels} is above data.max_pixels={self.max_pixels}")
        if self.overlong == PromptTruncation.drop and not self.filter_overlong_prompts:
            raise ValueError("data.truncation=drop needs data.filter_overlong_prompts=true, which finds those to drop")
        workers = self.filter_overlong_prompts_workers
        if workers is not None and workers < 1:
            raise ValueError(f"data.filter_overlong_prompts_workers={workers}: 1 or more, or null for one per core")
