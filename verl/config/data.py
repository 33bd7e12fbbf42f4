"""`data.*`: where rows come from and how they become prompts."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import II


@dataclass
class DataConfig:
    """Files are parquet, JSON or JSONL, folders of them, or names on the hub, `path@split`, comma-separated.

    `rollout_batch_size` counts prompts per step, `mini_rollout_batch_size` prompts per generation where
    `algorithm.online_filtering` needs several (default: as many). Lengths are in tokens, `min_pixels` and
    `max_pixels` bound the area of an image after resizing. A relative image path is looked up in `image_dir`.
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
    rollout_batch_size: int = 384
    mini_rollout_batch_size: int | None = None
    val_batch_size: int = 256
    min_pixels: int = 200704
    max_pixels: int = 1003520
    shuffle: bool = True
    num_workers: int = 2
    seed: int = II("trainer.seed")
