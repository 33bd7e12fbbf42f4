"""The passes before the updates: whose log-probs the ratio compares with; what a step counts, and what it refuses."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from verl.algorithms.requirements import requirements_of
from verl.columns import view_column
from verl.config.compose import compose_config
from verl.metrics.bag import MetricBag
from verl.metrics.machine import Timings
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.single_controller.reward_group import RewardGroup
from verl.trainer.ray_trainer import RayTrainer
from verl.trainer.step import check_components, run_passes
from verl.utils.interrupts import Interrupts, RunInterrupted
from verl.workers.reward.base import Failure, Outcome, RewardError

pytestmark = pytest.mark.usefixtures("in_repository")

ENGINE, TRAINER = -2.0, -3.0


def plan_of(preset: str, *overrides: str, updates: int = 1) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A plan, and workers whose trainer finds TRAINER for every token, behind three weight syncs."""
    base = ["data.train_files=a", "worker.actor.model.model_path=m", *overrides]
    config = compose_config(preset, base)

    def compute_log_probs(*views, exact=()):
        return {view_column(view, "log_probs"): torch.full((2, 3), TRAINER) for view in views}

    workers = SimpleNamespace(
        actor=SimpleNamespace(compute_log_probs=compute_log_probs), rollout=SimpleNamespace(version=3)
    )
    return SimpleNamespace(config=config, requirements=requirements_of(config.algorithm, updates)), workers


def old_log_probs(run: tuple[SimpleNamespace, SimpleNamespace], versions: list[int]) -> list[float] | None:
    """By row; None where the update's own forward gives them."""
    ones = torch.ones(len(versions), 3, dtype=torch.int64)
    tensors = dict.fromkeys(("input_ids", "attention_mask", "response_mask"), ones)
    tensors |= {"position_ids": ones[:, None].expand(-1, 3, -1), "rollout_log_probs": torch.full(ones.shape, ENGINE)}
    batch = DataProto.from_dict(
        {**tensors, "weight_version": torch.tensor(versions)}, {"mm_inputs": [Images()] * len(ones)}
    )
    found, _ = run_passes(*run, batch, Timings())
    return found["old_log_probs"][:, 0].tolist() if "old_log_probs" in found else None


@pytest.mark.parametrize("updates", [1, 3])
def test_a_response_that_waited_keeps_the_log_probs_it_was_drawn_with(updates):
    """With one update the ratio of the others is 1, and that of a waiting one must not be."""
    run = plan_of("dapo", updates=updates)
    assert old_log_probs(run, [2, 3]) == [ENGINE, TRAINER]
    assert old_log_probs(run, [3, 3]) == (None if updates == 1 else [TRAINER, TRAINER])
    pass_alone = plan_of("dapo", "algorithm.old_log_probs=recompute", updates=updates)
    assert old_log_probs(pass_alone, [2, 3]) == [TRAINER, TRAINER]
    assert old_log_probs(plan_of("dapo", "algorithm.old_log_probs=rollout", updates=updates), [2, 3]) is None


def test_a_term_that_reads_which_responses_are_right_needs_to_be_told():
    scored = [Outcome(None, Failure("timeout", ""), 1.0), Outcome({"overall": 1.0, "format": 1.0}, None, 0.1)]
    for option, named in (
        ("+term@algorithm.terms.imitation=sft", "algorithm.terms.imitation read"),
        ("algorithm.terms.perception_kl.incorrect_weight=0", "algorithm.terms.perception_kl read"),
    ):
        requirements = plan_of("papo_grpo", option)[0].requirements
        with pytest.raises(RewardError, match=f"{named} the reward's component 'accuracy'.*returns overall, format"):
            check_components(requirements, scored)
        check_components(requirements, [Outcome({"overall": 1.0, "accuracy": 1.0}, None, 0.1)])
    check_components(plan_of("papo_grpo")[0].requirements, scored)


def test_failures_are_counted_over_all_that_a_step_has_graded():
    """Also over ReMax's baselines and the groups that DAPO's filter drops, which no row of the step shows."""
    group = object.__new__(RewardGroup)
    group.worker = SimpleNamespace(begin=SimpleNamespace(remote=lambda expected: None))
    tally = group.begin(10)
    tally.graded, tally.reasons = 8, Counter({"timeout": 1, "raised": 3})
    assert tally.metrics() == {"failed_frac": 0.5, "failed/timeout": 0.125, "failed/raised": 0.375}
    assert (group.begin(10).graded, group.tally.reasons.total()) == (0, 0), "a validation counts apart"
    assert tally.graded == 8


@pytest.mark.parametrize("values", [(1.0, float("nan"), 2.0), (float("nan"), 1.0)])
def test_a_maximum_of_what_is_no_number_is_none_and_not_the_least(values):
    whole, parts = MetricBag(), []
    for value in values:
        whole.add_max("peak", value)
        parts.append(MetricBag())
        parts[-1].add_max("peak", value)
    for bag in (whole, MetricBag.merged(parts)):
        assert torch.tensor(bag.result()["peak"]).isnan()


def test_a_signal_between_two_steps_saves_before_it_ends(monkeypatch):
    """With stop_now it may come as an exception as soon as a step has begun."""
    saved = []

    class Signalled(Interrupts):
        def begin_step(self):
            super().begin_step()
            self.requested = "SIGTERM"
            raise KeyboardInterrupt

    trainer = object.__new__(RayTrainer)
    trainer.run_dir = SimpleNamespace(sync=lambda: None)
    trainer.plan = trainer.workers = trainer.state = None
    trainer.config = SimpleNamespace(ahead=0)
    trainer.keeper = SimpleNamespace(
        save_once=saved.append, close=lambda: None, driver_state=lambda: {"step": 6, "best_step": None}
    )
    with pytest.raises(RunInterrupted, match="ended by SIGTERM after step 6; the same command goes on"):
        trainer._step(7, Signalled("stop_now"))
    assert [state["step"] for state in saved] == [6]
