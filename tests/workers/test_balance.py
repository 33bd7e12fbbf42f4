"""How a step's rows are shared out among ranks and cut into micro-batches."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from tests.fakes.actors import CPU, gradient, on_ranks, papo_terms, process_group
from tests.fakes.rollouts import make_batch
from verl.columns import ORIGINAL
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.workers.training.balance import Unit, Work, load, micro_batches, share_rows, spread


def batch_of(groups: list[tuple[int, list[int]]]) -> DataProto:
    """Text rows of groups (tokens of the prompt, tokens of each response)."""
    rows = [(prompt, number, length) for number, (prompt, lengths) in enumerate(groups) for length in lengths]
    width, longest = max(prompt for prompt, _ in groups), max(length for _, _, length in rows)
    prompts = torch.arange(width)
    mask = torch.stack([(prompts >= width - prompt).long() for prompt, _, _ in rows])
    ids = torch.stack([torch.full((width + longest,), number + 1) for _, number, _ in rows])
    responses = torch.stack([(torch.arange(longest) < length).long() for _, _, length in rows])
    tensors = {"input_ids": ids, "attention_mask": torch.cat([mask, responses], 1), "response_mask": responses}
    return DataProto.from_dict(tensors, {"mm_inputs": [Images()] * len(rows)})


def log_normal(seed: int, prompts: int = 64, n: int = 8) -> DataProto:
    """Groups of a prompt with 275 tokens and responses of log-normal lengths."""
    draw = random.Random(seed)
    lengths = [[min(1024, max(1, int(draw.lognormvariate(4.8, 0.6)))) for _ in range(n)] for _ in range(prompts)]
    return batch_of([(275, own) for own in lengths])


def test_a_prompt_counts_once_and_each_response_of_its_own():
    work = Work(batch_of([(7, [3, 5]), (4, [2, 0])]), [ORIGINAL])
    assert work.tokens([0]) == 10 and work.tokens([0, 1]) == 15 and work.tokens(range(4)) == 21
    assert [unit.rows for unit in work.units(range(4))] == [(0, 1), (2, 3)]
    assert [unit.rows for unit in work.units(range(4), budget=14)] == [(0,), (1,), (2, 3)]


def test_a_view_adds_prefixes_patches_and_responses(assets):
    """Only rows with images are seen under it."""
    batch = make_batch(assets)
    plain, both = (Work(batch, views) for views in ([ORIGINAL], [ORIGINAL, "masked"]))
    patches = [images.patches for images in batch["mm_inputs"]]
    for row in range(len(batch)):
        tokens = int(batch["attention_mask"][row].sum()) + -(-patches[row] // 4)
        assert plain.tokens([row]) == tokens and both.tokens([row]) == 2 * tokens
    assert min(patches) > 0


def test_the_heaviest_go_first_to_where_there_is_least():
    units = [Unit((i,), tokens) for i, tokens in enumerate([5, 4, 3, 3, 3])]
    assert sorted(load(share) for share in spread(units, 2)) == [8, 10]
    assert [load(share) for share in spread(units[:1], 3)] == [5, 0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_get_equal_work_and_every_row_goes_to_one(ranks):
    batch = log_normal(seed=ranks)
    shares = share_rows(batch, mini_batches=4, ranks=ranks, views=[ORIGINAL])
    work = Work(batch, [ORIGINAL])
    assert sorted(row for share in shares for row in share.rows.tolist()) == list(range(len(batch)))
    for number in range(4):
        own = [share.rows.split(share.sizes)[number].tolist() for share in shares]
        assert {row // 128 for rows in own for row in rows} == {number}  # consecutive rows make a mini-batch
        loads = [work.tokens(rows) for rows in own]
        assert max(loads) * ranks <= 1.1 * work.tokens(range(128 * number, 128 * (number + 1)))


def test_a_group_is_parted_only_where_a_rank_would_be_idle():
    (one, other) = share_rows(batch_of([(10, [5, 5, 5, 5])]), 1, 2, [ORIGINAL])
    assert sorted(one.rows.tolist() + other.rows.tolist()) == [0, 1, 2, 3] and one.sizes == other.sizes == [2]
    shares = share_rows(batch_of([(10, [5, 5]), (10, [5, 5])]), 1, 2, [ORIGINAL])
    assert sorted(share.rows.tolist() for share in shares) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="a mini-batch of 1 rows has none for rank 1 of 2"):
        share_rows(batch_of([(10, [5]), (10, [5])]), 2, 2, [ORIGINAL])


@pytest.mark.parametrize("budget", [1, 600, 2000, 10**6])
def test_micro_batches_keep_to_the_budget_and_miss_no_row(budget):
    batch = log_normal(seed=3, prompts=6)
    batch["response_mask"][5] = 0  # not graded
    work, places = Work(batch, [ORIGINAL]), []
    with process_group():
        for own, rows in micro_batches(batch, [ORIGINAL], budget, CPU):
            assert len(own) == len(rows) and (len(own) == 1 or work.tokens(own.tolist()) <= budget)
            places += own.tolist()
    assert sorted(places) == [row for row in range(48) if row != 5]


def _cut(rank: int, batches: list[DataProto]) -> list[tuple[list[int], int]]:
    found = micro_batches(batches[rank], [ORIGINAL], 400, CPU)
    return [(places.tolist(), int(rows["response_mask"].sum())) for places, rows in found]


def test_ranks_make_equally_many_and_one_without_work_fills_up():
    few, many = batch_of([(50, [20])]), batch_of([(300, [50, 60]), (300, [80]), (200, [90])])
    ours, theirs = on_ranks(2, _cut, [few, many])
    assert len(ours) == len(theirs) > 1
    assert sorted(places for places, _ in ours if places) == [[0]] and [0, 0] != [t for _, t in theirs]
    assert all(tokens == 0 for places, tokens in ours if not places)


def _of_share(rank: int, model, batch: DataProto, ranks: int, budgets: list[int]):
    rows = batch.rows(share_rows(batch, 1, ranks, [ORIGINAL, "masked"])[rank].rows)
    return [gradient(model, rows, terms=papo_terms(), max_tokens_per_micro_batch=budget) for budget in budgets]


def test_the_gradient_is_the_same_on_balanced_ranks(model, assets):
    batch = make_batch(assets)
    batch = batch.rows(torch.arange(len(batch) - 1))  # a group that a filter has cut, and ranks of unequal size
    with process_group():
        whole, metrics = gradient(model, batch, terms=papo_terms())
    for found, own in chain(*on_ranks(2, _of_share, model, batch, 2, [1, 130, 10**6])):
        largest = max(g.abs().max() for g in whole.values())
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, atol=float(5e-6 * largest), rtol=0, msg=name)
        assert own["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-4)
