"""What a model cannot see is refused by name, and what its template begins is part of its turn."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests.fakes.rows import row, write_parquet
from verl.config.compose import compose_config
from verl.config.data import DataConfig
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.trainer.collect import reward_inputs
from verl.trainer.plan import check, check_engine, check_reference_and_critic, check_vision


def vision_of(families, model_type: str) -> VisionProcessor:
    return VisionProcessor(str(families[model_type] / "model"), 784, 12544)


def dataset(path: str, vision: VisionProcessor) -> PromptDataset:
    return PromptDataset(path, "data.train_files", DataConfig(train_files=path, max_prompt_length=200), vision)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_text_only_model_refuses_images_wherever_they_come_from(families, model_type, tmp_path):
    vision = vision_of(families, model_type)
    path = write_parquet(tmp_path / "a.parquet", [row("1+1?", images=0), row()])
    with pytest.raises(ValueError, match="a.parquet', row 1: 1 image.* 'images', and .*model_path.* reads text only"):
        dataset(path, vision)
    with pytest.raises(ValueError, match="model_path holds a Qwen.* which reads text only: it has no image processor"):
        vision.resize(Image.new("RGB", (28, 28)))
    with pytest.raises(ValueError, match="a:1: the prompt has 1 image.s., and Qwen.* reads text only"):
        vision.family.image_spans(torch.tensor([40]), Images.of([{}]), vision.config, "a:1")


def test_a_text_only_model_needs_neither_an_image_column_nor_images_in_it(families, tmp_path):
    vision = vision_of(families, "qwen3")
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "How much is 1+1?", "answer": "2"}))
    without = dataset(str(tmp_path / "a.jsonl"), vision)[0]
    empty = dataset(write_parquet(tmp_path / "a.parquet", [row("How much is 1+1?", images=0)]), vision)[0]
    assert without["prompt_ids"].tolist() == empty["prompt_ids"].tolist() and not without["mm_inputs"]
    assert "How much is 1+1?<|im_end|>" in vision.tokenizer.decode(without["prompt_ids"])


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3"])
def test_videos_are_refused_and_an_empty_column_of_them_is_not(families, model_type, tmp_path):
    vision = vision_of(families, model_type)
    lines = [{"problem": "1+1?", "answer": "2", "videos": videos} for videos in ([], ["a.mp4", "b.mp4"])]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="a.jsonl', row 1: 2 video.s. in column 'videos'"):
        dataset(str(path), vision)
    path.write_text(json.dumps(lines[0]))
    assert len(dataset(str(path), vision)) == 1


BASE = ["data.train_files=a", "data.val_files=b", "worker.actor.model.model_path=m"]


def test_masked_views_and_a_frozen_tower_need_a_model_that_sees(families):
    papo, grpo = (compose_config(name, BASE) for name in ("papo_grpo", "grpo"))
    sees, reads = (vision_of(families, model_type) for model_type in ("qwen3_vl", "qwen3"))
    check_vision(papo, check(papo), sees)
    check_vision(grpo, check(grpo), reads)
    with pytest.raises(ValueError, match="algorithm.views.masked .* holds a Qwen3 model.*grpo or dapo"):
        check_vision(papo, check(papo), reads)
    grpo.worker.actor.model.freeze_vision_tower = True
    check_vision(grpo, check(grpo), sees)
    with pytest.raises(ValueError, match="freeze_vision_tower=true: .* Qwen3 model, which reads text only"):
        check_vision(grpo, check(grpo), reads)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("qwen3_5", [], "Qwen3.5's linear attention in bfloat16 alone: set .*compute_dtype=bfloat16, or .*name=hf"),
        ("qwen3_5", ["worker.actor.fsdp.compute_dtype=bfloat16"], None),
        ("qwen3_vl", [], None),
        ("qwen3_vl", ["worker.rollout.enable_chunked_prefill=true"], "enable_chunked_prefill=true does not work"),
    ],
)
def test_an_engine_that_cannot_serve_a_run_is_refused_or_not_chosen(families, model_type, overrides, reason, caplog):
    config, family = compose_config("grpo", [*BASE, *overrides]), vision_of(families, model_type).family
    config.worker.rollout.name = "vllm"
    check_engine(config, family, "cuda", may_choose=False)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            check_engine(config, family, "cpu", may_choose=False)
    caplog.set_level("INFO")
    check_engine(config, family, "cpu", may_choose=True)
    assert config.worker.rollout.name == ("vllm" if reason is None else "hf")
    assert re.search(f"rollout engine: hf, not vllm: .*{reason}", caplog.text) if reason else not caplog.text


@pytest.mark.parametrize(("model_type", "size", "fits"), [("qwen3_vl", 14, False), ("qwen3_vl", 32, True)])
def test_squares_that_straddle_the_towers_patches_are_reported(families, model_type, size, fits, caplog):
    options = ["algorithm.views.masked.stage=resized", f"algorithm.views.masked.patch_size={size}"]
    config = compose_config("papo_grpo", [*BASE, *options])
    check_vision(config, check(config), vision_of(families, model_type))
    assert ("patch_size=14, and Qwen3-VL has patches of 16 pixels" in caplog.text) != fits


def test_a_reward_sees_the_tag_that_a_thinking_models_template_has_opened(families):
    """Qwen3-VL-Thinking never writes `<think>`: its prompt ends with it."""
    columns = {"responses": torch.tensor([[20, 21, 22]]), "response_mask": torch.tensor([[1, 1, 0]])}
    batch = DataProto.from_dict(columns, {"answer": ["7"], "uid": ["a:0"], "problem": ["?"]})
    seen = {}
    for model_type in ("qwen3_vl", "qwen2_5_vl"):
        vision = vision_of(families, model_type)
        (seen[model_type],) = reward_inputs(vision, batch)
        assert seen[model_type]["response_length"] == 2
    assert seen["qwen3_vl"]["response"] == "<think>\n" + seen["qwen2_5_vl"]["response"]


PIXELS = ["data.min_pixels=784", "data.max_pixels=12544"]


def test_reference_and_critic_must_read_what_the_actor_reads(families):
    sees = vision_of(families, "qwen3_vl")
    config = compose_config("papo_grpo", [*BASE, *PIXELS, f"worker.ref.model_path={families['qwen3_vl'] / 'model'}"])
    check_reference_and_critic(config, check(config), sees)
    config.worker.ref.model_path = str(families["qwen2_5_vl"] / "model")
    with pytest.raises(ValueError, match="worker.ref.model_path=.*model type"):
        check_reference_and_critic(config, check(config), sees)


def test_another_vocabulary_is_noticed(families, tmp_path):
    folder = shutil.copytree(families["qwen3_vl"] / "model", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    critic = ["algorithm.adv_estimator=gae", f"worker.critic.model_path={folder}"]
    config = compose_config("papo_grpo", [*BASE, *PIXELS, *critic])
    with pytest.raises(ValueError, match="worker.critic.model_path=.*vocabulary"):
        check_reference_and_critic(config, check(config), vision_of(families, "qwen3_vl"))
