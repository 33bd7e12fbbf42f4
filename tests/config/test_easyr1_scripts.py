"""Every example script of EasyR1 means here what it meant there, or is refused by a key that has no meaning here.

The settings are facts of EasyR1 (easyr1_settings.json); what they should become is written here once more, without the
table of the translation.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from verl.config.config import Config
from verl.legacy.translate import compose_legacy
from verl.trainer.plan import check

pytestmark = pytest.mark.usefixtures("in_repository")

SETTINGS = json.loads(Path(__file__).with_name("easyr1_settings.json").read_text())
SHARED = SETTINGS["configs"]["examples/config.yaml"]
REFUSED = {
    "qwen2_5_vl_7b_geo3k_sapo": "worker.actor.loss_type=sapo",
    "qwen3_14b_dapo17k_dapo": "worker.actor.ulysses_size=8",
}
ELSEWHERE = ("qwen2_5_vl_3b_android_gui_grpo",)  # its template and its reward function are not in this repository


@pytest.fixture
def config_file(tmp_path) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SHARED))
    return str(tmp_path / "config.yaml")


def overrides_of(script: str) -> list[str]:
    return [word for word in SETTINGS["commands"][script] if not word.startswith("config=")]


def said(script: str) -> dict[str, Any]:
    """What the script and its config set, by EasyR1's full keys."""
    values: dict[str, Any] = {}

    def flatten(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict) and name not in ("val_override_config", "reward_function_kwargs"):
                flatten(value, f"{prefix}{name}.")
            else:
                values[prefix + name] = value

    flatten(SHARED, "")
    for word in overrides_of(script):
        key, _, text = word.partition("=")
        values[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"a={text}"]))["a"]
    return values


SAME = """
    data.train_files data.val_files data.prompt_key data.answer_key data.image_key data.max_prompt_length
    data.max_response_length data.rollout_batch_size data.val_batch_size data.format_prompt data.shuffle data.seed
    data.min_pixels data.max_pixels data.filter_overlong_prompts algorithm.adv_estimator algorithm.online_filtering
    algorithm.filter_key algorithm.filter_low algorithm.filter_high worker.actor.global_batch_size
    worker.actor.max_grad_norm worker.actor.model.model_path worker.actor.model.trust_remote_code
    worker.actor.model.enable_gradient_checkpointing worker.actor.model.freeze_vision_tower
    worker.actor.model.lora.rank worker.actor.model.lora.alpha worker.actor.model.lora.target_modules
    worker.actor.optim.lr worker.actor.optim.weight_decay worker.actor.optim.strategy worker.actor.optim.lr_warmup_ratio
    worker.rollout.n worker.rollout.temperature worker.rollout.top_p worker.rollout.limit_images
    worker.rollout.gpu_memory_utilization worker.rollout.enforce_eager worker.rollout.tensor_parallel_size
    worker.reward.reward_function trainer.total_epochs trainer.max_steps trainer.experiment_name trainer.nnodes
    trainer.n_gpus_per_node trainer.max_try_make_batch trainer.val_freq trainer.val_generations_to_log trainer.save_freq
    trainer.save_limit
""".split()


def expected(old: dict[str, Any]) -> dict[str, Any]:
    """The settings of this framework, by key; None where there is no such term."""
    kl = None if old["algorithm.disable_kl"] else old["algorithm.kl_coef"]
    in_loss = old["algorithm.use_kl_loss"]
    clips = {"low": 0.2, "high": 0.3, "dual": 3.0}
    policy = {"default": "policy", "cispo": "cispo", "gspo_token": "gspo"}[old.get("worker.actor.loss_type", "default")]
    values = {key: old[key] for key in SAME}
    values |= {f"algorithm.terms.policy.clip_ratio_{n}": old.get(f"worker.actor.clip_ratio_{n}", d)
               for n, d in clips.items() if n != "dual" or policy == "policy"}  # fmt: skip
    values |= {
        f"worker.rollout.val_override_config.{n}": v for n, v in old["worker.rollout.val_override_config"].items()
    }
    rows = old["worker.actor.micro_batch_size_per_device_for_update"]
    return values | {
        "worker.actor.max_tokens_per_micro_batch": rows
        * (old["data.max_prompt_length"] + old["data.max_response_length"]),
        "algorithm.terms.policy.kind": policy,
        "algorithm.terms.ref_kl.coef": kl if in_loss else None,
        "algorithm.terms.ref_kl.kind": "ref_kl" if in_loss and kl is not None else None,
        "algorithm.reward_kl.coef": kl if not in_loss and kl is not None else 0.0,
        "algorithm.reward_kl.estimator": "k1",
        "algorithm.terms.perception_kl": None,
        "algorithm.terms.entropy.coef": 0.0,
        "algorithm.views": {},
        "data.mini_rollout_batch_size": (
            old.get("data.mini_rollout_batch_size") if old["algorithm.online_filtering"] else None
        ),
        "worker.actor.loss_avg_mode": old.get("worker.actor.loss_avg_mode", "token"),
        "worker.actor.ppo_epochs": 1,
        "worker.actor.optim.lr_warmup_steps": 0,
        "worker.actor.optim.lr_scheduler_type": "constant",
        "worker.actor.fsdp.offload": "between_phases",
        "worker.ref.fsdp.offload": "always",
        "worker.rollout.top_k": -1,
        "worker.reward.reward_function_kwargs": {},
        "trainer.logger": [*(n for n in old["trainer.logger"] if n != "file"), "jsonl"],
    }


def translated(script: str, config_file: str) -> Config:
    return compose_legacy(config_file, overrides_of(script))


@pytest.mark.parametrize("script", sorted(set(SETTINGS["commands"]) - set(REFUSED)))
def test_a_script_gives_its_settings(script, config_file):
    config = translated(script, config_file)
    found = OmegaConf.structured(config)
    wanted = expected(said(script))
    differs = {}
    for key, value in wanted.items():
        ours = OmegaConf.select(found, key)
        ours = OmegaConf.to_container(ours) if OmegaConf.is_config(ours) else ours
        if (sorted(ours) != sorted(value)) if key == "trainer.logger" else ours != value:
            differs[key] = (ours, value)
    assert not differs
    if script not in ELSEWHERE:
        config.trainer.logger = ["jsonl"]  # which trackers are installed is not the point here
        check(config)


@pytest.mark.parametrize("script", REFUSED)
def test_what_has_no_meaning_here_is_named(script, config_file):
    with pytest.raises(ValueError, match=f"{REFUSED[script]}, a key of EasyR1 or PAPO, is not taken over: "):
        translated(script, config_file)


def test_what_is_not_as_there_is_said_in_a_line_with_the_way_to_theirs(config_file, caplog):
    with caplog.at_level(logging.INFO, logger="verl"):
        translated("qwen3_4b_math_grpo_lora", config_file)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in lines if line.startswith("not as in EasyR1 and PAPO: ./examples/format_prompt/math.jinja")]
    assert any(
        "give the file of that name in a checkout of EasyR1 or PAPO as data.format_prompt" in line for line in lines
    )
    assert any("theirs over the rows of each micro-batch" in line for line in lines)
    assert not any("lora" in line for line in lines)  # its config leaves the vision tower out, as it is here
    caplog.clear()
    both = ["worker.actor.model.lora.exclude_modules=null", "data.format_prompt=my/math.jinja"]
    compose_legacy(config_file, [*overrides_of("qwen3_4b_math_grpo_lora"), *both])
    lines = [record.getMessage() for record in caplog.records]
    assert any("worker.actor.model.lora.vision_tower=true those of the vision tower as well" in line for line in lines)
    assert not any("wording" in line for line in lines)
    with pytest.raises(ValueError, match="lora.exclude_modules=lm_head.*trained in worker.*lora.target_modules"):
        compose_legacy(
            config_file, ["worker.actor.model.lora.rank=8", "worker.actor.model.lora.exclude_modules=lm_head"]
        )
