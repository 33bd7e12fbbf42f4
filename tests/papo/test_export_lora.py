"""`papo export` of a run with LoRA: merged, and as an adapter that peft loads."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from papo.cli import main
from papo.tools.export.merger import main as merge
from tests.fakes.actors import process_group
from verl.checkpoint.folder import CheckpointFolder
from verl.checkpoint.tensors import write_tensors
from verl.config.worker import LoRAConfig
from verl.models.lora import add_adapter
from verl.models.policy import PolicyModel
from verl.workers.fsdp.checkpoint import model_tensors

RANK, ALPHA = 4, 10


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """(a run's folder, the logits of the model with its adapter)"""
    torch.manual_seed(0)
    inner = AutoModelForImageTextToText.from_pretrained(assets / "model")
    lora = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    add_adapter(inner, lora, "org/base", torch.float32)
    for name, weight in inner.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    path = tmp_path_factory.mktemp("lora") / "run"
    folder = CheckpointFolder(str(path / "checkpoints"))
    actor = Path(folder.begin(3)) / "actor"
    (actor / "huggingface").mkdir(parents=True)
    inner.config.save_pretrained(actor / "huggingface")
    AutoProcessor.from_pretrained(assets / "model").save_pretrained(actor / "huggingface")
    with process_group():
        write_tensors(str(actor), model_tensors(PolicyModel(inner, [], 1.0, 8)))
    algorithm = {"adv_estimator": "grpo", "terms": {"policy": {"kind": "policy", "coef": 1.0}}, "views": {}}
    settings = {
        "worker": {"actor": {"model": {"model_path": "org/base", "lora": asdict(lora)}}},
        "algorithm": algorithm,
    }
    folder.commit(3, {"step": 3, "world_size": 1, "config": settings}, {})
    return path, logits(inner)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20, 40)[None]).logits


def test_merged_weights_compute_what_the_adapter_did(run, assets, tmp_path):
    path, expected = run
    main(["export", str(path), str(tmp_path / "out"), "--dtype", "fp32", "--merge-lora"])
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    plain = AutoModelForImageTextToText.from_pretrained(assets / "model")
    assert (logits(plain) - expected).abs().max() > 0.1
    assert found.state_dict().keys() == plain.state_dict().keys()
    assert "base_model: org/base\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_adapter_alone_is_what_peft_loads(run, assets, tmp_path):
    path, expected = run
    main(["export", str(path), str(tmp_path / "out"), "--dtype", "fp32"])
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    base = AutoModelForImageTextToText.from_pretrained(assets / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "The adapter (LoRA) of org/base after step 3" in card


def test_the_merger_merges_the_adapter_too(run, tmp_path):
    path, expected = run
    actor = path / "checkpoints" / "global_step_3" / "actor"
    merge(["--local_dir", str(actor), "--dtype", "fp32"])
    found = AutoModelForImageTextToText.from_pretrained(actor / "huggingface")
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
