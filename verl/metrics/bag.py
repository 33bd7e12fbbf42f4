"""MetricBag: metrics as (sum, count) pairs, maxima and totals, so that merging is exact and overwriting impossible."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


@dataclass
class MetricBag:
    """Collects metrics of micro-batches and ranks; `result` divides once, at the end."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add `value`, the sum of `count` observations."""
        total, number = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + float(value), number + float(count))

    def add_tokens(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the observations that `values` [B, T] has where `mask` [B, T] is set."""
        self.add(name, torch.where(mask.bool(), values, 0.0).double().sum().item(), mask.sum().item())

    def add_max(self, name: str, value: float) -> None:
        """Keep `value` if it is the largest so far, or not a number, which then stays."""
        kept, value = self.maxima.get(name, float("-inf")), float(value)
        self.maxima[name] = kept if math.isnan(kept) or kept >= value else value

    def add_total(self, name: str, value: float) -> None:
        """Add `value` to a sum over micro-batches and ranks."""
        self.totals[name] = self.totals.get(name, 0.0) + float(value)

    def merge(self, other: MetricBag) -> MetricBag:
        """Add everything in `other`; returns self."""
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, value in other.totals.items():
            self.add_total(name, value)
        return self

    @classmethod
    def merged(cls, bags: Iterable[MetricBag]) -> MetricBag:
        result = cls()
        for bag in bags:
            result.merge(bag)
        return result

    def result(self) -> dict[str, float]:
        """Means, maxima and totals by name; a metric that was never observed is left out, not reported as 0."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count > 0}
        return {**means, **self.maxima, **self.totals}
