"""A training batch made without an engine: real prompts, random responses of random lengths."""

from __future__ import annotations

from pathlib import Path

import torch

from papo.corruption.patches import RandomPatchConfig
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator, join_responses
from verl.data.dataset import PromptDataset
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto


def make_batch(
    assets: Path, path: str | None = None, prompts: int = 4, n: int = 2, prob: float = 0.6, width: int = 9
) -> DataProto:
    """prompts x n rows with every column that an update reads; log-probs of old and reference are made up."""
    path = path or str(assets / "train.parquet")
    vision = VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)
    data = PromptDataset(path, "k", DataConfig(train_files=path, max_prompt_length=200), vision)
    batch = PromptCollator(vision.special.pad)([data[i] for i in range(prompts)])
    batch = add_view(batch, "masked", RandomPatchConfig(prob=prob), vision, 1, 0)
    generator = torch.Generator().manual_seed(11)
    rows = prompts * n
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.randint(30, len(vision.tokenizer), (rows, width), generator=generator)
    ids[torch.isin(ids, torch.tensor(vision.special.banned))] = 30
    rollout = DataProto.from_dict(
        {
            "responses": torch.where(mask.bool(), ids, vision.special.pad),
            "response_mask": mask,
            "rollout_log_probs": torch.zeros(rows, width),
        }
    )
    batch = join_responses(batch, rollout, n)
    noise = torch.randn(2, rows, width, generator=generator) * 0.2 - 5.7  # near log(1/vocabulary), ratios near 1
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, width) * mask
    return batch.with_columns({"old_log_probs": noise[0], "ref_log_probs": noise[1], "advantages": advantages})
