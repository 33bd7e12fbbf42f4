"""DAPO's dynamic sampling: groups that teach nothing are dropped, and nothing else is lost, doubled or mixed up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.fakes.rows import row, write_parquet
from verl.algorithms.requirements import requirements_of
from verl.config.compose import compose_config
from verl.config.sizes import Sizes
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.trainer.collect import Collector
from verl.trainer.state import TrainState
from verl.workers.reward.base import Failure, Outcome, RewardError
from verl.workers.rollout.base import pad_responses

N = 2  # responses per prompt


class Engine:
    """Answers prompt number i with responses of i + 1 tokens, all of them token 40 + i; counts what it was asked."""

    def __init__(self, pad: int) -> None:
        self.pad, self.asked, self.asleep = pad, 0, False

    def generate(self, prompts, sampling, ahead=False):
        self.asked += 1
        self.asleep = False
        return [int(uid.rpartition(":")[2]) for uid in prompts["uid"]]

    def result(self, numbers):
        tokens = [[40 + number] * (number % 5 + 1) for number in numbers for _ in range(N)]
        out = pad_responses(tokens, [[-1.0] * len(ids) for ids in tokens], self.pad)
        return out.with_columns({"weight_version": torch.full((len(tokens),), self.asked)})

    def sleep(self):
        self.asleep = True


class Collected(Collector):
    """A collector whose steps are begun and finished at once."""

    def collect(self):
        return self.finish(self.begin())


@pytest.fixture
def make(assets, tmp_path):
    """A collector over 12 prompts of different lengths, 3 at a time, in steps of 4; `right` says by prompt how many of
    its two responses are right, `ungraded` which (prompt, response from 1) is not graded."""
    path = write_parquet(tmp_path / "a.parquet", [row("word " * i + "?", images=0, answer=str(i)) for i in range(12)])

    def make(right: list[int], tries: int = 4, ranks: int = 1, ungraded=(), **algorithm) -> Collector:
        config = compose_config(
            "dapo",
            [
                f"data.train_files={path}",
                "data.val_files=null",
                "data.format_prompt=null",
                f"worker.actor.model.model_path={assets / 'model'}",
                f"trainer.max_try_make_batch={tries}",
                "trainer.samples_per_step=0",
            ],
        )
        config = replace(config, algorithm=replace(config.algorithm, **algorithm))
        vision = VisionProcessor(str(assets / "model"), 784, 12544)
        data = PromptDataset(path, "k", config.data, vision)
        collator = PromptCollator(vision.special.pad)

        def reward(inputs):
            seen: dict[str, int] = {}
            outcomes = []
            for i in inputs:
                number = int(i["ground_truth"])
                seen[i["ground_truth"]] = seen.get(i["ground_truth"], 0) + 1
                accuracy = float(seen[i["ground_truth"]] <= right[number])
                failed = (number, seen[i["ground_truth"]]) in ungraded
                score = {"overall": 0.9 * accuracy, "accuracy": accuracy}
                outcomes.append(Outcome(None if failed else score, Failure("timeout", "") if failed else None, 0.1))
            return outcomes

        def prompts():
            for epoch in range(10):
                for start in range(0, 12, 3):
                    yield epoch, collator([data[i] for i in range(start, start + 3)])

        rewards = SimpleNamespace(start=reward, result=list, begin=lambda expected: None)
        workers = SimpleNamespace(rollout=Engine(vision.special.pad), reward=rewards)
        sizes = Sizes(ranks, 4, N, 2, 1, 8)
        plan = SimpleNamespace(
            config=config, sizes=sizes, requirements=requirements_of(config.algorithm, 1), vision=vision
        )
        return Collected(plan, workers, TrainState(prompts(), None, None))

    return make


def answers(rows) -> list[int]:
    return [int(answer) for answer in rows.batch["answer"]][::N]


def test_groups_that_are_all_right_or_all_wrong_are_replaced_and_the_surplus_waits(make):
    collector = make([0, 1, 2, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    first = collector.collect()
    assert answers(first) == [1, 3, 4, 5] and first.mini_batches == 2
    assert first.metrics["train/filter_tries"] == 2 and first.metrics["train/filter_waiting_groups"] == 0
    assert first.metrics["train/filter_all_right"] == first.metrics["train/filter_all_wrong"] == pytest.approx(1 / 6)
    second = collector.collect()
    assert answers(second) == [6, 8, 9, 10] and second.metrics["train/filter_waiting_groups"] == 1
    third = collector.collect()
    assert answers(third)[0] == 11 and collector.workers.rollout.asleep
    assert third.batch["weight_version"][0] == 4 and third.batch["weight_version"][-1] > 4


def test_rows_of_several_generations_keep_their_tokens_side_by_side(make):
    rows = make([0, 1, 2, 1, 1, 1, 1, 0, 1, 1, 1, 1]).collect()
    batch, pad = rows.batch, rows.batch["responses"].max()
    prompts = batch["prompt_ids"].shape[1]
    for i, number in enumerate([n for n in answers(rows) for _ in range(N)]):
        length = number % 5 + 1
        assert batch["responses"][i, :length].tolist() == [40 + number] * length
        assert batch["response_mask"][i].sum() == length
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        assert torch.equal(ids, torch.cat([prompt, batch["responses"][i, :length]])) and pad > 0
        positions = batch["position_ids"][i][:, batch["attention_mask"][i].bool()]
        assert torch.equal(positions, torch.arange(len(ids)).expand(3, -1))
        assert batch["input_ids"][i, prompts] == 40 + number  # every response begins in the same column
    scores = [outcome.score["accuracy"] for outcome in rows.outcomes()]
    assert scores == [1.0, 0.0] * 4 and len(rows.inputs) == len(rows.batch) == 8


def test_too_few_groups_make_a_smaller_step_and_the_odd_one_waits(make, caplog):
    collector = make([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0])
    with caplog.at_level("WARNING", logger="verl"):
        rows = collector.collect()
    assert "only 3 of 4 groups survived the filter in 4 tries" in caplog.text
    assert rows.mini_batches == 1 and answers(rows) == [1, 4]  # one update of two prompts
    assert collector.state.waiting["answer"].tolist() == ["7"] * N


def test_a_step_that_is_too_small_for_an_update_makes_a_smaller_one_if_ranks_can_share_it(make):
    one = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    rows = make(one, ranks=2).collect()
    assert rows.mini_batches == 1 and answers(rows) == [5]
    four = make(one, ranks=4)  # two responses cannot be shared by four: they wait for company
    assert four.collect() is None and len(four.state.waiting) == N
    assert answers(four.collect()) == [5, 5] and four.state.waiting is None


def test_a_step_without_a_single_group_is_none_and_does_not_end_the_run(make):
    collector = make([0] * 6 + [1] * 6, tries=2)
    assert collector.collect() is None
    assert answers(collector.collect()) == [6, 7, 8, 9]


def test_without_the_filter_every_prompt_is_taken_as_it_comes(make):
    collector = make([0] * 12, online_filtering=False)
    rows = collector.collect()
    assert answers(rows) == [0, 1, 2] and rows.metrics == {} and collector.workers.rollout.asked == 1


def test_a_filter_key_that_the_reward_does_not_return_is_named(make):
    with pytest.raises(RewardError, match="algorithm.filter_key='acc': the reward function returns overall, accuracy"):
        make([1] * 12, filter_key="acc").collect()


def test_a_group_is_judged_by_the_responses_that_were_graded(make):
    """Of two right ones, one lost leaves a group all right; a lost second one of a mixed group leaves one kind."""
    right = [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    rows = make(right, ungraded={(0, 1), (1, 2), (2, 1), (2, 2)}).collect()
    assert answers(rows) == [3, 4, 5, 6]
    assert rows.metrics["train/filter_all_right"] == pytest.approx(2 / 8)  # prompts 0 and 1; of 2 nothing is known
    assert rows.metrics["train/filter_all_wrong"] == 0
