"""Runs one step ahead (trainer.ahead=1) against ordinary ones, in real processes."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.fakes.runs import REWARD, numbers, records, start
from verl.config.compose import compose_config
from verl.config.option import check_options
from verl.config.trainer import Device, TrainerConfig
from verl.config.worker import RolloutConfig
from verl.single_controller.resources import plan_layout

STEPS = 5
LAG = ("rollout/weight_version", "rollout/staleness", "rollout/log_prob_diff", "rollout/mismatch_kl")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(REWARD)
    return [
        f"worker.reward.reward_function={reward}:score",
        "worker.rollout.name=hf",
        "worker.rollout.cpu_threads=1",
        "algorithm.terms.policy.tis=token",
        "trainer.n_gpus_per_node=1",
        "trainer.val_freq=2",
        "trainer.save_freq=1",
        "trainer.save_limit=0",
        "trainer.save_model=false",
        f"trainer.max_steps={STEPS}",
    ]


def run(assets, output, *overrides) -> list[dict]:
    done = start(assets, output, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    return numbers(output)


def without_lag(found: list[dict]) -> list[dict]:
    return [{name: v for name, v in step.items() if not name.startswith(LAG)} for step in found]


@pytest.mark.run
def test_without_learning_a_step_ahead_changes_nothing(assets, options, tmp_path):
    still = [*options, "worker.actor.optim.lr=1e-30"]
    now = without_lag(run(assets, tmp_path / "now", *still))
    ahead = without_lag(run(assets, tmp_path / "ahead", *still, "trainer.ahead=1"))
    assert len(now) == len(ahead) == STEPS + 1
    for one, other in zip(now, ahead, strict=True):  # a rank that shares its cores with an engine has fewer threads
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    responses = [[r["step"], r["uid"], r["response"], r["score"]] for r in records(tmp_path / "now" / "samples.jsonl")]
    found = [[r["step"], r["uid"], r["response"], r["score"]] for r in records(tmp_path / "ahead" / "samples.jsonl")]
    assert responses == found


@pytest.mark.run
@pytest.mark.parametrize("preset", [[], ["algorithm.online_filtering=true", "algorithm.filter_key=overall"]])
def test_versions_are_one_behind_and_a_resumed_run_is_the_same(assets, options, tmp_path, preset):
    output, learns = tmp_path / "run", [*options, *preset, "worker.actor.optim.lr=1e-3", "trainer.ahead=1"]
    whole = run(assets, output, *learns)
    steps = [step for step in whole if step["step"] and "rollout/staleness" in step]
    if not preset:
        assert [step["rollout/staleness"] for step in steps] == [0.0] + [1.0] * (STEPS - 1)
        assert [step["rollout/weight_version"] for step in steps] == [0.0, 0.0, 1.0, 2.0, 3.0]
    lines = records(output / "metrics.jsonl")
    assert all(0 < line["timing_s/overlap"] for line in lines if 0 < line["step"] < STEPS)
    assert all(0 <= line["perf/idle_trainer_frac"] < 1 for line in lines if 0 < line["step"] < STEPS)
    for step in range(3, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"global_step_{step}")
    os.remove(output / "summary.json")
    assert run(assets, output, *learns) == whole


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.ahead=1"], "algorithm.terms.policy.tis=off.*set algorithm.terms.policy.tis=token"),
        (["trainer.ahead=1", "algorithm.old_log_probs=rollout"], "set algorithm.old_log_probs=auto"),
        (["trainer.ahead=2"], "a value from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, says, in_repository):
    with pytest.raises(ValueError, match=f"trainer.ahead=.*{says}"):
        check_options(compose_config("quickstart", overrides))


def test_engines_and_ranks_share_the_cores_where_they_work_at_one_time(monkeypatch):
    monkeypatch.setattr("verl.single_controller.resources.usable_cores", lambda: 8)
    config = TrainerConfig(n_gpus_per_node=2, device=Device.cpu, ahead=1)
    layout = plan_layout(config, RolloutConfig(data_parallel_size=2))
    assert (layout.rollout_threads, layout.rank_threads) == (2, 2)
    layout = plan_layout(config, RolloutConfig(cpu_threads=6))
    assert (layout.rollout_threads, layout.rank_threads) == (6, 1)
