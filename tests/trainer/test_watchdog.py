"""The watchdog: quiet on a healthy run, awake before the reward falls, and able to act."""

from __future__ import annotations

import random

import pytest

from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.compose import build_terms
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.config.algorithm import WatchdogAction, WatchdogConfig
from verl.trainer.watchdog import Watchdog, find_signals

TERMS = build_terms(
    {
        "policy": PolicyTermConfig(),
        "perception_kl": PerceptionKLConfig(),
        "entropy": EntropyTermConfig(),
        "masked_entropy": EntropyTermConfig(view="masked"),
    }
)


def healthy(step: int, noise: random.Random) -> dict[str, float]:
    """The signals of the quickstart, as they drift and scatter in a run that goes well."""
    return {
        "actor/clip_frac_high": max(0.0, noise.gauss(0.0002, 0.0006)),
        "actor/perception_kl": 0.62 + noise.gauss(0, 0.05),
        "actor/entropy": 0.25 - 0.0012 * step + noise.gauss(0, 0.015),
        "actor/masked_entropy": 0.95 + noise.gauss(0, 0.07),
        "rollout/response_length_mean": 11.8 + noise.gauss(0, 0.3),
    }


def run(config: WatchdogConfig, steps: int, change=lambda step, metrics: metrics):
    """(watchdog, every event) of a run whose metrics `change` bends."""
    noise, watchdog, events, verdicts = random.Random(3), Watchdog(config, TERMS), [], []
    for step in range(1, steps + 1):
        verdicts.append(watchdog.observe(step, change(step, healthy(step, noise))))
        events += verdicts[-1].events
    return watchdog, events, verdicts


def runaway(step: int, metrics: dict[str, float]) -> dict[str, float]:
    """From step 60 on the perception KL grows by a tenth each step."""
    return {**metrics, "actor/perception_kl": metrics["actor/perception_kl"] * 1.1 ** max(0, step - 60)}


def test_what_is_watched_follows_from_the_terms():
    both = {signal.metric: signal.both_sides for signal in find_signals(TERMS)}
    assert both == {
        "actor/clip_frac_high": False,
        "rollout/response_length_mean": True,
        "actor/perception_kl": False,
        "actor/entropy": True,
        "actor/masked_entropy": False,
    }
    assert len(find_signals(build_terms({"policy": PolicyTermConfig()}))) == 2


def test_a_healthy_run_of_150_steps_is_left_alone():
    _, events, verdicts = run(WatchdogConfig(), 150)
    assert events == [] and all(v.scale == 1.0 and not v.stop for v in verdicts)


def test_a_term_that_runs_away_is_seen_within_ten_steps(caplog):
    with caplog.at_level("WARNING", logger="verl"):
        watchdog, events, verdicts = run(WatchdogConfig(), 80, runaway)
    assert events[0]["signal"] == "actor/perception_kl" and 62 <= events[0]["step"] <= 70
    assert events[0]["value"] > events[0]["high"] and events[0]["low"] is None
    assert "watchdog, step" in caplog.text and verdicts[-1].scale == 1.0 and not verdicts[-1].stop
    # What lies outside does not become the measure: it goes on being seen.
    assert len(events) > 3 and events[-1]["high"] == events[0]["high"]


def test_a_term_that_runs_away_from_the_first_step_is_seen_too():
    """The perception KL of a run with gamma = 0.1, a live masked view and no entropies, as logged."""
    logged = [0.82, 0.79, 1.62, 1.62, 2.38, 3.20, 4.14, 5.60, 6.23, 7.31, 7.67, 8.40, 8.29, 8.81]
    bend = lambda step, metrics: {**metrics, "actor/perception_kl": logged[step - 1]}  # noqa: E731
    _, events, _ = run(WatchdogConfig(), len(logged), bend)
    assert [event["step"] for event in events] == [9, 12]


def test_reduce_halves_again_and_again_and_stop_stops():
    _, events, verdicts = run(WatchdogConfig(action=WatchdogAction.reduce), 80, runaway)
    assert verdicts[-1].scale == 0.5 ** len(events) and events[0]["scale"] == 0.5
    _, events, verdicts = run(WatchdogConfig(action=WatchdogAction.stop), 80, runaway)
    assert verdicts[events[0]["step"] - 1].stop and not any(v.stop for v in verdicts[: events[0]["step"] - 1])
    assert run(WatchdogConfig(action=WatchdogAction.off), 80, runaway)[1] == []


@pytest.mark.parametrize(
    ("metric", "value", "seen"),
    [
        ("actor/entropy", 0.03, True),  # the original entropy falls before it rises
        ("actor/masked_entropy", 0.2, False),  # that of the masked view only counts when it rises
        ("actor/masked_entropy", 2.5, True),
        ("actor/clip_frac_high", 0.02, True),
        ("rollout/response_length_mean", 20.0, True),
    ],
)
def test_each_signal_counts_on_its_own_side(metric, value, seen):
    _, events, _ = run(WatchdogConfig(), 70, lambda step, m: {**m, metric: value} if step > 60 else m)
    assert bool(events) == seen and {event["signal"] for event in events} <= {metric}


def test_one_odd_step_is_no_event_and_a_missing_metric_is_none_either():
    assert run(WatchdogConfig(), 70, lambda s, m: {**m, "actor/perception_kl": 9.0} if s in (50, 55) else m)[1] == []
    assert run(WatchdogConfig(), 70, lambda s, m: {})[1] == []
