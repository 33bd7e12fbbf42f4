"""Loaders: a shuffling one that can be resumed in the middle of an epoch, and a plain one for validation."""

from __future__ import annotations

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from verl.data.collate import PromptCollator


def train_loader(
    dataset: Dataset, batch_size: int, shuffle: bool, seed: int, num_workers: int, collator: PromptCollator
) -> StatefulDataLoader:
    """Batches of `batch_size` prompts; `loader.sampler.set_epoch(e)` before each epoch gives it its own order.

    The last, incomplete batch of an epoch is left out: every step has the same number of prompts.
    `state_dict` and `load_state_dict` carry the position within an epoch.

    Raises ValueError where the data has less than one batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"data.train_files has {len(dataset)} prompts, fewer than one step takes "
            f"(data.rollout_batch_size={batch_size})"
        )
    sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collator,
        drop_last=True,
    )


def validation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, collator: PromptCollator
) -> StatefulDataLoader:
    """All prompts in order, the last batch as short as it is."""
    return StatefulDataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collator)
