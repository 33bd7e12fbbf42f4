"""Every algorithm makes two real steps in Ray workers: generation, reward, passes, advantages, updates, weight sync.

One set of workers serves them all; what an algorithm needs of them is what its own config requires.
"""

from __future__ import annotations

import itertools
import math
import operator
from pathlib import Path

import pytest
import ray

from tests.conftest import REPOSITORY
from tests.fakes.steps import two_steps
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.trainer.plan import Plan, make_plan
from verl.trainer.workers import Workers
from verl.workers.model_worker import ModelWorker

pytestmark = pytest.mark.run

# An untrained model never answers right; this reward has something to teach all the same, and cannot grade everything.
REWARD = """
import os

REWARD_TYPE = "sequential"

def compute_score(reward_input):
    number = sum(map(ord, reward_input["response"])) + int(reward_input["uid"].rpartition(":")[2])
    if number % 18 == 0:
        os._exit(1)
    if number % 6 == 0:
        raise ArithmeticError(number)
    score = number % 5 / 4
    return {"overall": score, "accuracy": float(score > 0.4)}
"""
ALGORITHMS = {
    "grpo": [],
    "dr_grpo": ["algorithm.adv_estimator=dr_grpo"],
    "rloo": ["algorithm.adv_estimator=rloo"],
    "reinforce_plus_plus": ["algorithm.adv_estimator=reinforce_plus_plus"],
    "reinforce_plus_plus_baseline": ["algorithm.adv_estimator=reinforce_plus_plus_baseline"],
    "remax": ["algorithm.adv_estimator=remax"],
    "ppo": ["algorithm.adv_estimator=gae", "algorithm.lam=0.95"],
    "dapo": ["algorithm.online_filtering=true", "algorithm.overlong_buffer=4"],
    "reward_kl": ["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.reward_kl.coef=0.1"],
    "adaptive_reward_kl": ["algorithm.reward_kl.coef=0.1", "algorithm.reward_kl.controller=adaptive"],
    "vppo": ["+shaper@algorithm.shapers.vppo=tokens", "algorithm.shapers.vppo.min_scale=0.9"],
}


def compose(assets: Path, reward: Path, *overrides: str) -> Config:
    return compose_config(
        "quickstart",
        [
            f"data.train_files={assets / 'train.parquet'}",
            "data.val_files=null",
            f"data.format_prompt={REPOSITORY / 'examples/format_prompt/math_perception.jinja'}",
            "data.rollout_batch_size=4",
            "data.max_response_length=8",
            f"worker.actor.model.model_path={assets / 'model'}",
            "worker.actor.global_batch_size=2",
            "worker.actor.optim.lr_warmup_steps=0",
            "worker.rollout.n=3",
            f"worker.reward.reward_function={reward}:compute_score",
            "worker.reward.max_failure_frac=0.9",
            f"trainer.output_dir={reward.parent / 'out'}",
            *("trainer.n_gpus_per_node=1", "trainer.max_steps=2", "trainer.device=cpu"),
            *("trainer.val_before_train=false", "trainer.val_after_train=false", "trainer.val_freq=0"),
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def built(ray_cluster, assets, tmp_path_factory) -> tuple[Plan, Workers, Path]:
    """Workers of every role."""
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(REWARD)
    plan = make_plan(compose(assets, reward, *ALGORITHMS["ppo"]))
    workers = Workers.build(plan)
    yield plan, workers, reward
    workers.rollout.stop()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_steps(built, assets, name):
    plan, workers, reward = built
    version = workers.rollout.version
    prompts = ((epoch, prompts) for epoch in itertools.count() for prompts in plan.train_loader)
    state, results = two_steps(plan, workers, compose(assets, reward, *ALGORITHMS[name]), prompts)
    assert workers.rollout.version == version + 2
    for result in results:
        assert all(map(math.isfinite, result.values()))
        assert result["actor/grad_norm"] > 0 and result["actor/skipped_frac"] == 0
        assert result["actor/grad_per_token/policy"] > 0
        assert result["train/reward"] > 0 and 0 <= result["reward/failed_frac"] < 0.9
    first, last = results
    newer = last["rollout/weight_version"] - first["rollout/weight_version"]
    assert newer == 1 or (name == "dapo" and 0 < newer < 1)  # groups that waited are a step older
    if "reward_kl" in name:
        assert first["train/reward_kl_coef"] == 0.1 and last["train/reward_kl"] != 0
        assert (state.reward_kl.coef == 0.1) == (name == "reward_kl")
    if name == "remax":  # baselines are graded, too, and dapo's dropped groups
        assert round(first["reward/failed_frac"] * 4 * (3 + 1), 9) % 1 == 0
    if name == "vppo":
        assert last["train/vppo/score"] > 0 and 0.2 < last["train/vppo/weighted_fraction"] < 0.5
        assert last["train/vppo/scale_max"] >= 1
    failures = workers.reward.take_failures()
    assert {failure["reason"] for failure in failures} <= {"died", "raised"}
    for failure in failures:
        assert (sum(map(ord, failure["response"])) + int(failure["uid"].rpartition(":")[2])) % 6 == 0
    critic = {"critic/vf_loss", "critic/explained_variance"}
    assert critic & last.keys() == (critic if name == "ppo" else set())


def test_an_adapter_is_the_actors_alone(built, assets, tmp_path):
    """A critic, and a reference that is another model, are made from the actor's settings and train or freeze all."""
    reward = built[2]
    lora = ["worker.actor.model.lora.rank=2", f"worker.ref.model_path={assets / 'model'}"]
    plan = make_plan(compose(assets, reward, *ALGORITHMS["ppo"], *lora))
    workers = Workers.build(plan)
    try:
        _, results = two_steps(plan, workers, plan.config, ((0, prompts) for prompts in plan.train_loader))
        groups = ((workers.actor, "policy"), (workers.reference, "policy"), (workers.critic, "critic.model"))
        names = {group.role: ray.get(group.workers[0].__ray_call__.remote(weight_names, of)) for group, of in groups}
    finally:
        workers.rollout.stop()
    assert {role for role, found in names.items() if any("lora" in name for name in found)} == {"actor"}
    assert results[1]["actor/ref_kl"] > 0 and results[1]["critic/vf_loss"] > 0


def weight_names(worker: ModelWorker, model: str) -> list[str]:
    return [name for name, _ in operator.attrgetter(model)(worker).named_parameters()]
