"""Watches a run for collapse: a maximised term that runs away drags entropies, clipping and lengths with it."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from verl.algorithms.losses.compose import LossTerm
from verl.config.algorithm import WatchdogAction, WatchdogConfig

logger = logging.getLogger(__name__)

# A standard deviation of a normal distribution, from the median absolute deviation.
SPREAD_OF_MAD = 1.4826
ENOUGH = 5  # values that make a first band


@dataclass(frozen=True)
class Signal:
    """A metric, whether falling out of its band below counts, and the least half-width of the band."""

    metric: str
    both_sides: bool
    floor: float


@dataclass
class Track:
    """A signal's recent healthy values, and for how many steps in a row it has been outside of their band."""

    values: deque[float]
    outside: int = 0


@dataclass(frozen=True)
class Verdict:
    """`scale` multiplies the coefficients of the maximised terms from the next step on."""

    scale: float = 1.0
    stop: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)


def find_signals(terms: list[LossTerm]) -> list[Signal]:
    """Signals to watch (arXiv 2507.06448, figure 11): the share of tokens that the upper clip stops, every maximised
    term, the entropies (the original one falls before it rises), and the length of responses."""
    signals = [Signal("actor/clip_frac_high", False, 0.005), Signal("rollout/response_length_mean", True, 3.0)]
    for term in terms:
        if term.kind.sign < 0:
            signals.append(Signal(term.metric, False, 0.1))
        elif term.kind.name == "entropy":
            signals.append(Signal(term.metric, not getattr(term.config, "view", ""), 0.1))
    return signals


class Watchdog:
    """Compares each step's signals with the band of their last `window` healthy values: median +- the largest of
    `tolerance` standard deviations (the median at most), `relative` x the median, and a floor of the signal's own.

    A signal that is outside for `patience` steps in a row is an event. Values outside do not move the band.
    """

    def __init__(self, config: WatchdogConfig, terms: list[LossTerm]) -> None:
        self.config = config
        self.signals = find_signals(terms)
        self.tracks = {signal.metric: Track(deque(maxlen=config.window)) for signal in self.signals}
        self.scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        """The recent values of every signal, as plain values."""
        tracks = {name: {"values": list(track.values), "outside": track.outside} for name, track in self.tracks.items()}
        return {"scale": self.scale, "tracks": tracks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; a signal that it did not know begins anew."""
        self.scale = state["scale"]
        for name, track in self.tracks.items():
            known = state["tracks"].get(name, {"values": [], "outside": 0})
            track.values.extend(known["values"])
            track.outside = known["outside"]

    def observe(self, step: int, metrics: dict[str, float]) -> Verdict:
        """The verdict on `step`, from its metrics."""
        if self.config.action == WatchdogAction.off:
            return Verdict()
        events = [e for s in self.signals if s.metric in metrics and (e := self._look(s, step, metrics[s.metric]))]
        if events and self.config.action == WatchdogAction.reduce:
            self.scale *= self.config.reduce_factor
        for event in events:
            event |= {"action": self.config.action.value, "scale": self.scale}
            logger.warning(
                "watchdog, step %d: %s = %.4g has left its band, %s to %.4g (action: %s%s)",
                step,
                event["signal"],
                event["value"],
                "any" if event["low"] is None else f"{event['low']:.4g}",
                event["high"],
                event["action"],
                f", maximised terms now x {self.scale:g}" if self.config.action == WatchdogAction.reduce else "",
            )
        return Verdict(self.scale, bool(events) and self.config.action == WatchdogAction.stop, events)

    def _look(self, signal: Signal, step: int, value: float) -> dict[str, Any] | None:
        """The event that this value is, or None."""
        track = self.tracks[signal.metric]
        if step <= self.config.warmup_steps:
            return None
        if len(track.values) < min(ENOUGH, self.config.window):
            track.values.append(value)
            return None
        low, high = self._band(signal, track.values)
        if (low is None or low <= value) and value <= high:
            track.values.append(value)
            track.outside = 0
            return None
        track.outside += 1
        if track.outside % self.config.patience:
            return None
        return {"step": step, "signal": signal.metric, "value": value, "low": low, "high": high}

    def _band(self, signal: Signal, values: deque[float]) -> tuple[float | None, float]:
        """(low, high); no low where only a rise counts."""
        centre = statistics.median(values)
        spread = SPREAD_OF_MAD * statistics.median(abs(value - centre) for value in values)
        # A signal that grows from the first step on scatters widely; its band must not grow along with it.
        scatter = min(self.config.tolerance * spread, abs(centre))
        half = max(scatter, self.config.relative * abs(centre), signal.floor)
        return (centre - half if signal.both_sides else None), centre + half
