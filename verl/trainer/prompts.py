"""The prompts of a run, in order, from any place on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from verl.protocol import DataProto


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
