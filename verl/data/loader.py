"""Loaders: a shuffling one that can be resumed in the middle of an epoch, and a plain one for validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.protocol import DataProto
from verl.utils.rng import derive_seed

# Batches that each loader process has ready or in the making: more would only fill the host's memory with images.
PREFETCHED = 1


class WeightedSampler(StatefulDistributedSampler):
    """In each epoch every row of a file `weight` times: the whole part of it is the same in each epoch, of the rest the
    epochs take their turns, so that after a while all rows have come equally often. Order and choice follow from seed
    and epoch."""

    def __init__(self, dataset: PromptDataset, shuffle: bool, seed: int) -> None:
        self.prompts = dataset
        super().__init__(range(len(self._chosen(0, seed))), num_replicas=1, rank=0, shuffle=shuffle, seed=seed)

    def __iter__(self) -> Iterator[int]:
        chosen = self._chosen(self.epoch, self.seed)
        for place in super().__iter__():
            yield chosen[place]

    def _chosen(self, epoch: int, seed: int) -> list[int]:
        """Items of the dataset; the copy c of an item stands c times the dataset's length behind it."""
        chosen: list[int] = []
        for number, (weight, items) in enumerate(self.prompts.shares()):
            whole, rest = divmod(round(weight * len(items)), len(items))
            for copy in range(whole):
                chosen += [item + copy * len(self.prompts) for item in items]
            turns = torch.randperm(
                len(items), generator=torch.Generator().manual_seed(derive_seed(seed, "weights", number))
            )
            turn = (epoch * rest + torch.arange(rest)) % len(items)
            chosen += sorted(items[i] + whole * len(self.prompts) for i in turns[turn].tolist())
        return chosen


def train_loader(
    dataset: PromptDataset, batch_size: int, shuffle: bool, seed: int, num_workers: int, collator: PromptCollator
) -> StatefulDataLoader:
    """Batches of `batch_size` prompts; `loader.sampler.set_epoch(e)` before each epoch gives it its own order.

    The last, incomplete batch of an epoch is left out: every step has the same number of prompts.
    `state_dict` and `load_state_dict` carry the position within an epoch. Besides the batch in use, at most
    `num_workers` batches are in memory: they are made while the engine generates.

    Raises ValueError where the data has less than one batch.
    """
    if all(weight == 1 for weight, _ in dataset.shares()):
        sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
    else:
        sampler = WeightedSampler(dataset, shuffle, seed)
    if len(sampler) < batch_size:
        raise ValueError(
            f"data.train_files has {len(sampler)} prompts, fewer than one step takes "
            f"(data.rollout_batch_size={batch_size})"
        )
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collator,
        drop_last=True,
        prefetch_factor=PREFETCHED if num_workers else None,
    )


def validation_loader(
    dataset: PromptDataset, batch_size: int, num_workers: int, collator: PromptCollator
) -> StatefulDataLoader:
    """Batches of all prompts in order, the last one maybe shorter. Raises ValueError for files with weights."""
    if any(weight != 1 for weight, _ in dataset.shares()):
        raise ValueError("data.val_files: every prompt is validated once; weights are for data.train_files")
    prefetch = PREFETCHED if num_workers else None
    return StatefulDataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collator, prefetch_factor=prefetch
    )


class PromptStream(Iterator[tuple[int, DataProto]]):
    """(epoch, prompts), epoch after epoch without end. A place in it is an epoch and how many of its prompts have been
    drawn, whatever the loader's batch size and workers are."""

    def __init__(self, loader: StatefulDataLoader) -> None:
        self.loader = loader
        self.epoch = self.drawn = 0
        self.batches: Iterator[DataProto] | None = None

    def __next__(self) -> tuple[int, DataProto]:
        while True:
            if self.batches is None:
                self._open_epoch()
            prompts = next(self.batches, None)
            if prompts is not None:
                self.drawn += len(prompts)
                return self.epoch, prompts
            self.epoch, self.drawn, self.batches = self.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last prompts that were drawn, as plain values."""
        return {"epoch": self.epoch, "drawn": self.drawn, "prompts": len(self.loader.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.drawn = state["epoch"], state["drawn"]
        self._open_epoch()

    def _open_epoch(self) -> None:
        self.loader.sampler.set_epoch(self.epoch)
        self.loader.sampler.load_state_dict({"yielded": self.drawn})
        self.batches = iter(self.loader)
