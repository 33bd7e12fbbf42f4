"""Packed rows: every token once, each prompt once for all of its responses, and nothing leaks from one to another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from tests.fakes.actors import build_actor, log_probs, process_group
from tests.fakes.families import QWEN
from tests.fakes.rollouts import make_batch
from verl.models import attention
from verl.models.attention import segment_attention, use_segments, window_attention
from verl.models.families.base import Images
from verl.models.forward import model_inputs
from verl.models.packing import Packed, pack, take

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [5, 6, 7], [8], [5, 6, 7], [8], [9, 9]]
LENGTHS = [4, 1, 2, 0, 3, 4]  # of the responses; tokens 100 x row + place
WIDTH = 5  # of the response columns


def image(digest: str) -> Images:
    return Images(({"pixels": torch.ones(2, 3)},), (digest,))


def packed(images: list[Images] | None = None) -> Packed:
    longest = max(map(len, PROMPTS))
    ids = torch.zeros(len(PROMPTS), longest + WIDTH, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
        ids[row, longest : longest + length] = 100 * row + torch.arange(length)
        mask[row, longest - len(prompt) : longest + length] = 1
    positions = (mask.cumsum(1) - 1)[:, None].expand(-1, 3, -1)
    return pack(ids, mask, positions, mask[:, longest:], images or [Images()] * len(PROMPTS), CPU)


def test_each_prompt_stands_once_before_its_responses():
    found = packed()
    first = [5, 6, 7, 0, 1, 2]  # rows 0, 1 (one token, which predicts nothing) and 3 (none)
    second = [8, 200, 400, 401]
    assert found.ids[0].tolist() == [*first, *second, 9, 9, 500, 501, 502]
    assert found.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 1, 2, 0, 1, 2, 3, 4]
    assert found.targets.tolist() == [0, 1, 2, 3, 100, 200, 201, 400, 401, 402, 500, 501, 502, 503]
    assert found.states.tolist() == [2, 3, 4, 5, 2, 6, 7, 6, 8, 9, 11, 12, 13, 14]
    assert found.valid.sum(1).tolist() == LENGTHS and found.images is None


def test_a_prefix_is_shared_by_content_and_images_are_part_of_it():
    one, other = image("a"), image("b")
    found = packed([one, other, one, image("a"), one, other])
    assert found.ids[0].tolist()[:9] == [5, 6, 7, 0, 1, 2, 5, 6, 7]  # row 1 has another picture
    assert found.owner == [0, 1, 0, 1] and found.images["pixels"].shape == (4, 3)


def visible(found: Packed) -> torch.Tensor:
    """[T, T] what each token may see, from the rule and not from the segments: 0 to 5 is the first group."""
    segments = [(0, 3, 0), (3, 6, 0), (6, 7, 6), (7, 8, 6), (8, 10, 6), (10, 12, 10), (12, 15, 10)]
    allowed = torch.zeros(15, 15, dtype=torch.bool)
    for start, end, prefix in segments:
        prefix_end = next(e for s, e, _ in segments if s == prefix)
        for place in range(start, end):
            allowed[place, prefix : min(prefix_end, place + 1)] = True
            allowed[place, start : place + 1] = True
    return allowed


def by_loop(q, k, v, query_ends, key_ends, max_q, max_k, scale, window_size, enable_gqa):
    """What varlen_attn computes, segment by segment: causal, aligned to the end of the keys."""
    assert window_size == (-1, 0) and max_q == query_ends.diff().max() and max_k == key_ends.diff().max()
    found = []
    for (a, b), (c, d) in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [False, True], ids=["equal shapes", "variable lengths"])
def test_attention_and_its_gradient_are_those_of_a_dense_mask(kv_heads, lengths, monkeypatch):
    if lengths:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_loop)
        monkeypatch.setattr(attention, "_by_bucket", attention._by_length)
    found, generator = packed(), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 15, 8, dtype=torch.float64, generator=generator) for h in (4, kv_heads, kv_heads))
    results = []
    for dense in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        if dense:
            out = F.scaled_dot_product_attention(*inputs, attn_mask=visible(found), scale=0.3, enable_gqa=True)
            out = out.transpose(1, 2)
        else:
            out, _ = segment_attention(SimpleNamespace(), *inputs, None, found.segments, scaling=0.3)
        (out * torch.arange(15.0)[:, None, None]).sum().backward()
        results.append([out, *(tensor.grad for tensor in inputs)])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)


def test_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match="sliding window of 4 tokens"):
        segment_attention(
            SimpleNamespace(), *[torch.ones(1, 1, 15, 2)] * 3, None, packed().segments, 1.0, sliding_window=4
        )


def test_one_response_changes_no_other_bit_for_bit(assets):
    batch = make_batch(assets, n=4)
    tokens = batch["input_ids"].clone()
    place = tokens.shape[1] - batch["response_mask"].shape[1]
    tokens[1, place] = (tokens[1, place] - 29) % 10 + 30  # the first token of the second response
    assert tokens[1, place] != batch["input_ids"][1, place] and batch["response_mask"][1].sum() > 1
    changed = batch.with_columns({"input_ids": tokens})
    with process_group():
        policy = build_actor(assets / "model").policy
        before, after = (log_probs(policy, rows) for rows in (batch, changed))
    others = torch.arange(len(batch)) != 1
    assert torch.equal(before[others], after[others]) and (before[1] != after[1]).sum() > 1


def test_padding_and_repeated_prompts_cost_nothing(assets):
    batch = make_batch(assets, prompts=2, n=4)
    inputs = model_inputs(
        batch.select(["input_ids", "attention_mask", "position_ids", "response_mask", "mm_inputs"]), CPU
    )
    prompts = (batch["attention_mask"].sum(1) - batch["response_mask"].sum(1))[::4].sum()
    assert inputs["packed"].ids.shape[1] == prompts + (batch["response_mask"].sum(1) - 1).sum()


def test_windows_of_a_tower_attend_within_themselves_in_one_call_for_each_length():
    query, key, value = torch.randn(3, 1, 2, 21, 4).unbind()
    ends = torch.tensor([0, 5, 12, 17, 21], dtype=torch.int32)
    found, _ = window_attention(SimpleNamespace(), query, key, value, None, 0.5, ends, 7)
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        own = (tensor[:, :, start:end] for tensor in (query, key, value))
        expected = F.scaled_dot_product_attention(*own, scale=0.5).transpose(1, 2)
        torch.testing.assert_close(found[:, start:end], expected, atol=1e-6, rtol=0)


def test_a_tower_by_segments_gives_what_it_gives_by_sdpa(families):
    for model_type in QWEN:
        model = AutoModelForImageTextToText.from_pretrained(families[model_type] / "model")
        batch = make_batch(families[model_type])
        images = [item for row in batch["mm_inputs"] for item in row.items]
        tensors = {name: torch.cat([item[name] for item in images]) for name in images[0]}
        arguments = tensors["pixel_values"], tensors["image_grid_thw"]
        plain = torch.cat(model.model.get_image_features(*arguments, return_dict=True).pooler_output)
        use_segments(model)
        found = torch.cat(model.model.get_image_features(*arguments, return_dict=True).pooler_output)
        assert plain.abs().max() > 0 and model.config.vision_config._attn_implementation == attention.VISION
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("places", [torch.arange(1024) % 7, torch.arange(1024).view(2, 512) % 7])
def test_gradients_of_a_place_that_is_taken_often_add_up_in_one_order(places):
    """With two threads indexing adds them in any order, and a run could not be repeated."""
    tensor = torch.randn(3, 9, 64, requires_grad=True)
    pull = torch.randn(3, *places.shape, 64)
    found = set()
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            tensor.grad = None
            taken = take(tensor, 1, places)
            taken.backward(pull)
            found.add(tensor.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(1)
    assert len(found) == 1 and torch.equal(taken, tensor[:, places])
    by_hand = torch.zeros(3, 9, 64, dtype=torch.float64)
    for place, one in zip(places.flatten(), pull.flatten(1, -2).double().transpose(0, 1), strict=True):
        by_hand[:, place] += one
    torch.testing.assert_close(tensor.grad.double(), by_hand, rtol=1e-4, atol=1e-4)
