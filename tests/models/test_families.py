"""Every supported family does what plain transformers does with its model: one set of tests for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, Qwen3_5MoeConfig

from papo.corruption.patches import RandomPatchConfig
from tests.fakes.actors import build_actor, gradient, log_probs, on_ranks, process_group, update, weights
from tests.fakes.critics import build_critic, plain_values
from tests.fakes.families import MODELS, QWEN, VISION
from tests.fakes.rollouts import make_batch
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.config.compose import compose_config
from verl.config.worker import ModelConfig
from verl.data.collate import PromptCollator, join_responses
from verl.data.dataset import PromptDataset
from verl.data.views import add_view
from verl.data.vision import VisionProcessor, load_special_tokens
from verl.models import onednn
from verl.models.families import FAMILIES, family_of
from verl.models.families.base import Images, positions_of_response
from verl.protocol import DataProto
from verl.workers.fsdp.export import save_huggingface
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.hf_engine import HFEngine

SIZES = [[], [(28, 28)], [(84, 56)], [(56, 140), (28, 28), (112, 84)]]


@dataclass
class Case:
    """A family's tiny model, and two responses to each of four prompts: without images twice, with one, with two."""

    model_type: str
    folder: Path
    model: Path
    batch: DataProto

    def plain(self, folder: Path | None = None) -> torch.nn.Module:
        auto = AutoModelForImageTextToText if self.model_type in VISION else AutoModelForCausalLM
        return auto.from_pretrained(folder or self.model)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, families) -> Case:
    folder = families[request.param]
    return Case(request.param, folder, folder / "model", make_batch(folder))


@pytest.fixture(scope="module", autouse=True)
def large_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "LARGE", 0)  # linear layers are computed as in models of a useful size
        yield


@pytest.fixture
def one_rank():
    with process_group():
        yield


def plain_log_probs(case: Case, plain: torch.nn.Module, row: int, images: str = "mm_inputs") -> torch.Tensor:
    """Log-probs of one response by the Hugging Face model on this row alone, with positions that it makes itself."""
    batch = case.batch
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    inputs = batch[images][row].tensors()
    if inputs:
        inputs["mm_token_type_ids"] = (ids == plain.config.image_token_id).int()[None]
    logits = plain(input_ids=ids[None], **inputs).logits[0, :-1].clone()
    logits[:, list(load_special_tokens(str(case.model)).banned)] = float("-inf")
    length = int(batch["response_mask"][row].sum())
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[-length:, 0]


def test_every_supported_family_is_tested():
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_positions_equal_those_of_transformers(families, sizes):
    for model_type in QWEN:
        folder = str(families[model_type] / "model")
        vision = VisionProcessor(folder, min_pixels=784, max_pixels=50176)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        images = [Image.new("RGB", size) for size in sizes]
        encoded = vision.encode_prompt(vision.chat_text("Look: " + "<image>" * len(images) + " add."), images)
        ids, grid = encoded["prompt_ids"], encoded["mm_inputs"].tensors().get("image_grid_thw")
        types = (ids == model.config.image_token_id).int()
        expected, delta = model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grid)
        torch.testing.assert_close(encoded["prompt_positions"], expected[:, 0])
        after = positions_of_response(encoded["prompt_positions"][None], 3)[0]
        first = len(ids) + int(delta)  # transformers goes on at length + delta
        assert after.tolist() == [[first, first + 1, first + 2]] * 3


@pytest.mark.parametrize("model_type", VISION)
def test_the_tokens_of_an_image_follow_from_its_size(families, model_type):
    vision = VisionProcessor(str(families[model_type] / "model"), min_pixels=784, max_pixels=20000)
    text = vision.chat_text("Look: <image>")
    for size in [(28, 28), (56, 56), (57, 112), (200, 40), (300, 300), (40, 390), (130, 131)]:
        encoded = vision.encode_prompt(text, [Image.new("RGB", size)])
        assert len(encoded["prompt_ids"]) == vision.count_tokens([text])[0] - 1 + vision.num_image_tokens(*size)
        ((_, length),) = vision.family.image_spans(encoded["prompt_ids"], encoded["mm_inputs"], vision.config, "a")
        assert length == encoded["mm_inputs"].patches // vision.family.merge(vision.config) ** 2


def test_positions_of_text_count(case):
    config = case.plain().config
    assert family_of(config).positions(torch.tensor([40, 41, 42]), Images(), config).tolist() == [[0, 1, 2]] * 3


def test_log_probs_of_a_mixed_padded_batch_are_those_of_each_row_alone(case, one_rank):
    actor, plain = build_actor(case.model), case.plain()
    views = ("mm_inputs", "masked_mm_inputs") if case.model_type in VISION else ("mm_inputs",)
    found = {}
    for images in views:
        view = images.removesuffix("mm_inputs").rstrip("_")
        found[images] = log_probs(actor.policy, case.batch, view)
        for row in range(len(case.batch)):
            if images == "mm_inputs" or case.batch["masked_rows"][row]:
                expected = plain_log_probs(case, plain, row, images)
                torch.testing.assert_close(found[images][row, : len(expected)], expected, atol=1e-5, rtol=0)
    if case.model_type in VISION:  # or pictures would not matter, and nothing above be tested
        assert (found["masked_mm_inputs"] - found["mm_inputs"])[4:].abs().max() > 0.05


def test_the_gradient_is_that_of_the_plain_model(case, one_rank):
    """Of -log π, averaged over tokens; images are shared between the responses to a prompt."""
    terms = {"entropy": EntropyTermConfig(coef=1.0)}
    found, _ = gradient(case.model, case.batch, terms=terms, live=False)
    plain = case.plain()
    torch.cat([-plain_log_probs(case, plain, row) for row in range(len(case.batch))]).mean().backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    assert_same(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())  # every weight takes part, deepstack's too


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding, measured against the largest entry of the whole gradient."""
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 1e-3
    for name, value in expected.items():
        assert (found[name] - value).abs().max().item() < tolerance * scale, name


TERMS = {"policy": PolicyTermConfig(), "entropy": EntropyTermConfig(coef=0.2)}
TWO_UPDATES = {"terms": TERMS, "live": False, "mini_batches": 2, "lr": 0.1}


def _updates_of_rank(rank, folders):
    """By model type, what one of two ranks does to the weights with its half of the rows."""
    onednn.LARGE = 0  # as in `large_layers`; this process is of its own
    halves = {model_type: make_batch(folder).chunk(2)[rank] for model_type, folder in folders.items()}
    return {name: gradient(folders[name] / "model", half, **TWO_UPDATES)[0] for name, half in halves.items()}


@pytest.fixture(scope="module")
def two_ranks(families) -> list[dict[str, dict[str, torch.Tensor]]]:
    return on_ranks(2, _updates_of_rank, families)


def test_two_updates_on_two_ranks_one_of_which_has_no_image_are_those_on_one(case, two_ranks, one_rank):
    """Ranks that ran different collectives would wait for each other until the process group's timeout."""
    halves = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # both ranks' first mini-batches, then their second
    whole, _ = gradient(case.model, case.batch.rows(halves), **TWO_UPDATES)
    for rank in two_ranks:
        assert_same(rank[case.model_type], whole, tolerance=1e-4)


@pytest.mark.parametrize("model_type", VISION)
def test_a_frozen_vision_tower_stays(families, model_type, one_rank):
    folder = families[model_type]
    moved, _ = gradient(folder / "model", make_batch(folder), terms=TERMS, live=False, freeze_vision_tower=True)
    tower = family_of(AutoConfig.from_pretrained(folder / "model")).tower_name
    assert all((step != 0).any() != name.startswith(tower) for name, step in moved.items())


def test_bfloat16_and_gradient_checkpointing_as_in_real_runs(case, one_rank):
    options = {"terms": TERMS, "live": False, "enable_gradient_checkpointing": True}
    exact, rounded = build_actor(case.model), build_actor(case.model, compute_dtype="bfloat16", **options)
    reference, found = (log_probs(a.policy, case.batch) for a in (exact, rounded))
    assert 0 < (found - reference).abs().max() < 0.2
    assert update(rounded, case.batch, 1).result()["actor/skipped_frac"] == 0
    plain, _ = gradient(case.model, case.batch, terms=TERMS, live=False)
    assert_same(gradient(case.model, case.batch, **options)[0], plain)


def test_values_of_a_critic_are_those_of_the_plain_model(case, one_rank):
    values = build_critic(case.model).compute_values(case.batch)
    _, expected = plain_values(case.plain(), case.batch)
    assert values.abs().max() > 0.01
    for row, own in enumerate(expected):
        torch.testing.assert_close(values[row, : len(own)].double(), own.detach(), atol=1e-5, rtol=0)


def test_hf_engine_and_trainer_agree(case, one_rank):
    path = str(case.folder / "train.parquet")
    overrides = [f"data.train_files={path}", "data.val_files=null", f"worker.actor.model.model_path={case.model}"]
    config = compose_config("quickstart", [*overrides, "data.format_prompt=null"])
    vision = VisionProcessor(str(case.model), 784, 12544)
    data = PromptDataset(path, "data.train_files", config.data, vision)
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(4)])
    engine = HFEngine(config, vision.special, torch.device("cpu"))
    assert len(engine.packed) > 10 or not onednn.is_supported()
    request = SamplingParams(n=3, temperature=0.8, top_p=1.0, top_k=-1, max_tokens=12, seed=0)
    responses = engine.generate(prompts, [replace(request, seed=i) for i in range(4)])
    actor = build_actor(case.model, temperature=0.8)
    batch = join_responses(prompts, responses, 3)
    trainer = log_probs(actor.policy, batch)
    assert responses["response_mask"].sum() > 30
    assert (trainer - responses["rollout_log_probs"]).abs().max() < 1e-4


def test_an_exported_policy_loads_in_plain_transformers(case, one_rank, tmp_path):
    actor = build_actor(case.model, terms=TERMS, live=False, lr=0.1)
    update(actor, case.batch, 1)
    save_huggingface(actor.policy, ModelConfig(str(case.model)), str(tmp_path / "saved"))
    trained = log_probs(actor.policy, case.batch)
    plain = case.plain(tmp_path / "saved")
    for row in (0, 4, 7):
        expected = plain_log_probs(case, plain, row)
        torch.testing.assert_close(trained[row, : len(expected)], expected, atol=1e-5, rtol=0)
    assert set(plain.state_dict()) == set(weights(actor))
    texts = [VisionProcessor(str(path), 784, 12544).chat_text("1+1?") for path in (case.model, tmp_path / "saved")]
    assert texts[0] == texts[1]


def test_modality_tokens_are_banned_and_the_end_token_is_not(case):
    vision = VisionProcessor(str(case.model), 784, 12544)
    names = vision.tokenizer.convert_ids_to_tokens(list(vision.special.banned))
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(names)
    assert not set(vision.special.eos) & set(vision.special.banned)


def patches_of(tensors: dict[str, torch.Tensor], patch: int) -> torch.Tensor:
    """[patches, values] of an image, those of InternVL's small picture behind its tiles left out."""
    pixels = tensors["pixel_values"]
    if pixels.dim() == 2:
        return pixels
    tiles = pixels[:-1] if len(pixels) > 1 else pixels
    return torch.nn.functional.unfold(tiles, patch, stride=patch).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    ("model_type", "patch"), [("qwen2_vl", 14), ("qwen3_vl", 16), ("qwen3_5", 16), ("internvl", 14)]
)
def test_masks_of_a_resized_picture_lie_on_the_towers_patches(families, model_type, patch):
    vision = VisionProcessor(str(families[model_type] / "model"), 784, 12544)
    assert vision.family.patch_size(vision.config) == patch
    pixels = np.random.default_rng(0).integers(1, 256, (50, 90, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels)]
    original = vision.encode_prompt(vision.chat_text("<image>"), images)["mm_inputs"]
    objects = {"uid": ["a"], "images": [images], "view_images": [{}], "mm_inputs": [original]}
    row = DataProto.from_dict({"response_mask": torch.ones(1, 1)}, objects)
    black = patches_of(vision.encode_images([Image.new("RGB", (2 * patch, 2 * patch))]).tensors(), patch)[0]
    config = RandomPatchConfig(stage="resized", prob=0.5, patch_size=patch)
    masked = patches_of(add_view(row, "masked", config, vision, 1, 0)["masked_mm_inputs"][0].tensors(), patch)
    hidden, kept = (masked == black).all(dim=1), (masked == patches_of(original.tensors(), patch)).all(dim=1)
    assert bool((hidden ^ kept).all()) and hidden.any() and kept.any()


def test_untested_families_are_refused_by_name():
    with pytest.raises(ValueError, match=r"holds a 'qwen3_5_moe' model; supported: .*qwen3_5 \(Qwen3.5\)"):
        family_of(Qwen3_5MoeConfig())
    with pytest.raises(
        ValueError, match=r"holds a 'gpt2' model; supported: .*qwen3_vl \(Qwen3-VL\).*qwen2 \(Qwen2.5\)"
    ):
        family_of(GPT2Config())
