"""Real runs that are asked to end, or killed at any moment: the same command goes on, and the numbers are the same."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fakes.runs import launch, numbers, records, start

pytestmark = pytest.mark.run

STEPS = 18

# An untrained model is never right, so a coin decides which response is; some responses it cannot grade.
REWARD = """
import hashlib

REWARD_TYPE = "sequential"

def score(one):
    coin = hashlib.md5((one["response"] + one["ground_truth"]).encode()).digest()[0]
    if coin % 8 == 0:
        raise ValueError("not this one")
    return {"overall": float(coin % 2), "accuracy": float(coin % 2)}
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """The fewest processes that a run can have, a checkpoint at every step, and no validation."""
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(REWARD)
    return [
        f"worker.reward.reward_function={reward}:score",
        "worker.reward.max_failure_frac=0.9",
        "~term@algorithm.terms.ref_kl",
        "worker.rollout.name=hf",
        "trainer.n_gpus_per_node=1",
        "trainer.val_before_train=false",
        "trainer.val_after_train=false",
        "trainer.val_freq=0",
        "trainer.save_freq=1",
        "trainer.save_model=false",
        f"trainer.max_steps={STEPS}",
    ]


@pytest.fixture(scope="module")
def undisturbed(assets, options, tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl, and reward_failures.jsonl."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = start(assets, output, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    found, failures = numbers(output), records(output / "reward_failures.jsonl")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert len({failure["step"] for failure in failures}) > STEPS / 3
    return found, failures


def wait_for(process: subprocess.Popen, what: Callable[[], object], log: Path) -> None:
    """Until `what` is true of a run that goes on."""
    while not what():
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.002)


def steps_done(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:  # not there yet, or moved aside: a run that was killed before its first checkpoint
        return 0


def saving(run: Path) -> bool:
    return any(run.glob("checkpoints/.global_step_*.tmp"))


def actor() -> psutil.Process:
    """The training worker of the run."""
    found = [child for child in psutil.Process().children(recursive=True) if "ActorWorker" in " ".join(child.cmdline())]
    assert len(found) == 1
    return found[0]


def assert_same(run: Path, undisturbed: tuple[list[dict], list[dict]]) -> None:
    """The run has every step of the undisturbed one once, with the same numbers, and the same failures."""
    expected, failures = undisturbed
    found = numbers(run)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        differs = {name: (one.get(name), other.get(name)) for name in one.keys() | other.keys()}
        assert {name: pair for name, pair in differs.items() if pair[0] != pair[1]} == {}, one["step"]
    assert records(run / "reward_failures.jsonl") == failures


def test_killed_at_ten_moments_a_run_loses_and_doubles_nothing(assets, options, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    moments, unfinished = random.Random(4), 0
    for kill in range(10):
        before = steps_done(run)
        process = launch(assets, run, log, *options, own_ray=kill % 5 == 0)  # which dies with it
        wait_for(process, lambda: steps_done(run) > before, log)  # noqa: B023
        if kill % 2:
            wait_for(process, lambda: saving(run), log)
        else:
            time.sleep(moments.uniform(0, 1.5))
        if kill in (4, 7):  # a worker dies, and the run with it
            actor().kill()
            assert process.wait(120) != 0
        else:
            process.kill()
            process.wait()
        unfinished += saving(run)
    assert unfinished >= 2, "several kills were to fall into a save"
    done = start(assets, run, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "going on from" in done.stderr
    # Every step once, and none that contradicts another.
    assert_same(run, undisturbed)


@pytest.mark.parametrize(("number", "on_signal"), [(signal.SIGTERM, "finish_step"), (signal.SIGINT, "stop_now")])
def test_a_signal_saves_and_ends_well_and_the_same_command_goes_on(
    assets, options, undisturbed, tmp_path, number, on_signal
):
    run, log = tmp_path / "run", tmp_path / "log"
    options = [*options, "trainer.save_freq=100", f"trainer.on_signal={on_signal}"]
    process = launch(assets, run, log, *options)
    wait_for(process, lambda: steps_done(run) == 2, log)
    process.send_signal(number)
    assert process.wait(120) == 0, log.read_text()[-4000:]
    done = steps_done(run)
    assert f"ended by {number.name} after step {done}" in log.read_text()
    assert (
        2 <= done < STEPS and (run / f"checkpoints/global_step_{done}").is_dir() and not (run / "summary.json").exists()
    )
    assert start(assets, run, *options).returncode == 0
    assert_same(run, undisturbed)


def test_a_second_signal_ends_at_once_and_one_before_the_first_step_loses_nothing(assets, options, tmp_path):
    log = tmp_path / "log"
    process = launch(assets, tmp_path / "second", log, *options)
    wait_for(process, lambda: steps_done(tmp_path / "second") == 1, log)
    process.send_signal(signal.SIGTERM)
    wait_for(process, lambda: "a second signal" in log.read_text(), log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    early = tmp_path / "early_log"
    process = launch(assets, tmp_path / "early", early, *options)
    wait_for(process, lambda: "starting workers" in early.read_text(), early)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, early.read_text()[-4000:]
    assert "no step had been done" in early.read_text()
