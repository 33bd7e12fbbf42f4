"""A response that could not be graded changes nothing for the others, whatever estimates their advantages."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.rewards import RewardKL, overlong_penalty, token_rewards
from verl.config.compose import compose_config
from verl.protocol import DataProto
from verl.trainer.state import TrainState
from verl.trainer.step import add_advantages
from verl.workers.reward.base import Failure, Outcome

N, PROMPTS, WIDTH = 4, 3, 6
FAILED = [1, 4, 5, 6, 7, 11]  # one of the first prompt, all of the second, one of the third
KEPT = [row for row in range(N * PROMPTS) if row not in FAILED]
LENGTHS = [3, 6, 1, 4, 2, 2, 5, 3, 6, 2, 4, 1]
BASE = ["data.train_files=a", "data.val_files=b", "worker.actor.model.model_path=m", "data.max_response_length=6"]
OPTIONS = {
    **{name: [f"algorithm.adv_estimator={name}"] for name in ADVANTAGES},
    "overlong": ["algorithm.overlong_buffer=3"],
    "kl": ["algorithm.reward_kl.coef=0.3", "algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.9"],
    "vppo": ["+shaper@algorithm.shapers.vppo=tokens", "algorithm.shapers.vppo.min_scale=0.9"],
}


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    names = ("rollout_log_probs", "old_log_probs", "ref_log_probs", "values", "masked_log_probs")
    columns = {name: -torch.rand(mask.shape, generator=generator) * mask for name in names}
    columns["baseline_scores"] = torch.rand(PROMPTS, generator=generator).repeat_interleave(N)
    return {**columns, "response_mask": mask, "masked_rows": torch.ones(len(mask), dtype=torch.bool)}


def scores() -> list[float]:
    return torch.rand(N * PROMPTS, generator=torch.Generator().manual_seed(1)).tolist()


def found(options: list[str], columns: dict[str, torch.Tensor], failed: list[int]) -> DataProto:
    config = compose_config("papo_grpo" if "vppo" in str(options) else "grpo", [*BASE, *options])
    plan = SimpleNamespace(config=config, sizes=SimpleNamespace(responses_per_prompt=N))
    state = TrainState(None, None, RewardKL(config.algorithm.reward_kl))
    outcomes = [
        Outcome(None, Failure("timeout", ""), 1.0) if row in failed else Outcome({"overall": score}, None, 0.1)
        for row, score in enumerate(scores())
    ]
    batch, _, metrics = add_advantages(plan, state, DataProto.from_dict(columns), outcomes)
    assert all(map(math.isfinite, metrics.values()))
    return batch


def expected(name: str, rows: list[int]) -> torch.Tensor:
    """Advantages of the rows, computed from those rows alone."""
    columns = {column: values[rows] for column, values in data().items()}
    mask = columns["response_mask"]
    overall = torch.tensor(scores())[rows]
    if name == "overlong":
        overall = overall + overlong_penalty(mask.sum(-1), WIDTH, 3)
    columns["rewards"] = token_rewards(overall, mask)
    if name == "kl":
        columns["rewards"] = columns["rewards"] - 0.3 * (columns["old_log_probs"] - columns["ref_log_probs"])
    columns |= {"scores": columns["rewards"].sum(-1), "group": torch.tensor(rows) // N}
    estimator = {"overlong": "grpo", "kl": "reinforce_plus_plus"}.get(name, name)
    return ADVANTAGES[estimator](columns, gamma=0.9 if name == "kl" else 1.0, lam=1.0)["advantages"]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "vppo"])
def test_advantages_are_those_of_a_batch_without_the_row(name):
    batch = found(OPTIONS[name], data(), FAILED)
    torch.testing.assert_close(batch["advantages"][KEPT], expected(name, KEPT), atol=1e-6, rtol=1e-5)
    assert (batch["advantages"][FAILED] == 0).all() and (batch["response_mask"][FAILED] == 0).all()
    assert (batch["scores"][FAILED] == 0).all() and (
        batch["response_mask"][KEPT] == data()["response_mask"][KEPT]
    ).all()
    if "returns" in batch:
        assert (batch["returns"][FAILED] == 0).all()
    complete = found(OPTIONS[name], data(), [])
    torch.testing.assert_close(complete["advantages"], expected(name, list(range(12))), atol=1e-6, rtol=1e-5)
    assert torch.equal(complete["response_mask"], data()["response_mask"])


def test_shapers_do_not_see_it_either():
    """The dependency of a row that was left out is not the least one of the step."""
    columns = data()
    columns["masked_log_probs"][FAILED] = columns["old_log_probs"][FAILED]
    changed = {**columns, "masked_log_probs": columns["masked_log_probs"].clone()}
    changed["masked_log_probs"][FAILED] -= 9.0
    one, other = (found(OPTIONS["vppo"], c, FAILED)["advantages"] for c in (columns, changed))
    assert torch.equal(one, other) and one[KEPT].abs().max() > 0


def test_a_baseline_that_was_not_graded_takes_its_prompt_along():
    columns = data()
    columns["baseline_scores"][:N] = float("nan")
    batch = found(OPTIONS["remax"], columns, FAILED)
    rows = [row for row in KEPT if row >= N]
    torch.testing.assert_close(batch["advantages"][rows], expected("remax", rows))
    assert (batch["advantages"][:N] == 0).all() and (batch["response_mask"][:N] == 0).all()
