"""What a run leaves: the folder, the curves, the metrics of a batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from verl.config.config import Config
from verl.config.worker import RolloutConfig
from verl.protocol import DataProto
from verl.tracking.curves import draw_curves
from verl.trainer.launch import describe
from verl.trainer.run_dir import RunDir
from verl.trainer.step import reward_metrics, rollout_metrics, warn_of_mismatch
from verl.workers.reward.base import Failure, Outcome


def config(path) -> Config:
    built = Config()
    built.trainer.output_dir = str(path)
    for part, name in (
        (built.data, "train_files"),
        (built.worker.actor.model, "model_path"),
        (built.worker.reward, "reward_function"),
    ):
        setattr(part, name, "x")
    return built


def test_earlier_runs_are_moved_aside_and_numbered(tmp_path):
    for number in range(3):
        RunDir(config(tmp_path / "run")).write_summary({"number": number})
    for name, number in (("run", 2), ("run.previous-1", 0), ("run.previous-2", 1)):
        assert json.loads((tmp_path / name / "summary.json").read_text())["number"] == number


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="trainer.output_dir='.*' holds files that are not a run's: name another"):
        RunDir(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("steps", [1, 60])
def test_curves_are_a_picture_that_changes_with_the_numbers(tmp_path, steps):
    def picture(value: float) -> bytes:
        with open(tmp_path / "metrics.jsonl", "w") as file:
            for step in range(steps + 1):
                record = {"step": step, "train/reward": value * step, "actor/entropy": 1.0}
                file.write(json.dumps(record | ({"val/accuracy": value} if step % 25 == 0 else {})) + "\n")
        draw_curves(str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png"))
        image = Image.open(tmp_path / "curves.png")
        assert image.size[0] > 600 and image.format == "PNG"
        return image.tobytes()

    assert picture(0.1) != picture(0.2)


def test_metrics_of_rewards_and_of_engine_against_trainer():
    scores = [{"overall": s, "accuracy": a} for s, a in ((1.0, 1), (0.1, 0), (0.1, 0), (0.1, 0))]
    outcomes = [Outcome(score, None, 0.5) for score in scores] + [Outcome(None, Failure("timeout", "late"), 2.0)]
    metrics = reward_metrics(outcomes, torch.tensor([0, 0, 1, 1, -5]))
    assert metrics["timing_s/reward_slowest"] == 2.0
    assert metrics["train/reward"] == pytest.approx(0.325) and metrics["train/accuracy"] == 0.25
    assert metrics["train/groups_without_signal"] == 0.5
    batch = DataProto.from_dict(
        {
            "response_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
            "rollout_log_probs": torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
            "old_log_probs": torch.tensor([[-1.1, -2.0, 9.0], [-1.0, -1.0, -0.6]]),
            "weight_version": torch.tensor([4, 4]),
        }
    )
    metrics = rollout_metrics(batch, max_response_length=3, version=4)
    assert metrics["rollout/log_prob_diff_mean"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["rollout/log_prob_diff_max"] == pytest.approx(0.4, abs=1e-6)
    expected = sum(math.exp(d) - 1 - d for d in (-0.1, 0, 0, 0, 0.4)) / 5  # k3, by hand
    assert metrics["rollout/mismatch_kl"] == pytest.approx(expected, abs=1e-7)
    assert metrics["rollout/weight_version"] == 4
    assert metrics["rollout/response_length_mean"] == 2.5 and metrics["rollout/truncated"] == 0.5
    # A response that waited was drawn from other weights: it says nothing of the engine.
    batch = batch.with_columns({"weight_version": torch.tensor([3, 4])})
    metrics = rollout_metrics(batch, max_response_length=3, version=4)
    assert metrics["rollout/mismatch_kl"] == pytest.approx((math.exp(0.4) - 1.4) / 3, abs=1e-7)
    assert metrics["rollout/response_length_mean"] == 2.5 and metrics["rollout/weight_version"] == 3.5
    assert "rollout/mismatch_kl" not in rollout_metrics(batch, max_response_length=3, version=5)


def test_an_engine_that_samples_from_another_policy_is_warned_of(caplog):
    metrics = {"rollout/mismatch_kl": 0.3, "rollout/log_prob_diff_max": 2.0, "rollout/weight_version": 4.0}
    plain, nucleus = RolloutConfig(), RolloutConfig(top_p=0.99)
    nearly = {**metrics, "rollout/mismatch_kl": 0.025}  # of which a nucleus of 0.99 explains 0.01
    for quiet, sampling in (
        ({**metrics, "rollout/mismatch_kl": 0.01}, plain),
        ({}, plain),
        (nearly, nucleus),
        (metrics, RolloutConfig(top_p=0.7)),
        (metrics, RolloutConfig(top_k=5)),
        (metrics, RolloutConfig(ignore_eos=True)),
    ):
        warn_of_mismatch(quiet, sampling)
    assert not caplog.records
    warn_of_mismatch(nearly, plain)
    warn_of_mismatch(metrics, nucleus)
    assert "rollout engine and trainer disagree: KL 0.025 nats per token" in caplog.text
    assert "rollout engine and trainer disagree: KL 0.3 nats per token" in caplog.text


def test_the_end_of_a_run_in_words(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    lines = describe(
        {"steps": 3, "seconds": 9.0, "val_accuracy_before": 0.25, "val_accuracy_after": 0.5}, str(tmp_path)
    )
    assert lines[1] == "validation accuracy: 25.0% before, 50.0% after (+25.0 points)"
    assert lines[2].endswith("summary.json") and len(lines) == 3
    lines = describe({"steps": 0, "seconds": 9.0, "val_accuracy": 0.25, "val_reward": 0.3}, str(tmp_path))
    assert lines[1:3] == ["validation accuracy: 25.0%", "validation reward: 0.3000"]
