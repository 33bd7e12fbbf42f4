"""Command lines of EasyR1 and PAPO give the settings that they gave there."""

from __future__ import annotations

import shlex

import pytest
from omegaconf import OmegaConf

from verl.config.compose import compose_config
from verl.config.config import Config
from verl.trainer.main import compose, parse
from verl.trainer.plan import check

pytestmark = pytest.mark.usefixtures("in_repository")

CONSOLE = "trainer.logger=[console]"  # which trackers are installed is not the point here

VIRL = "data.train_files=PAPOGalaxy/PAPO_ViRL39K_train data.val_files=PAPOGalaxy/PAPO_MMK12_test "
PAPO = (
    VIRL + "data.rollout_batch_size=384 data.format_prompt=examples/format_prompt/math_perception.jinja "
    "worker.rollout.tensor_parallel_size=1 worker.actor.global_batch_size=128 trainer.total_epochs=2 "
    "worker.reward.reward_function=examples/reward_function/math.py:compute_score data.max_prompt_length=4096 "
)
B3 = PAPO + "worker.actor.model.model_path=Qwen/Qwen2.5-VL-3B-Instruct trainer.n_gpus_per_node=2 "
B7 = PAPO + "worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct trainer.n_gpus_per_node=4 "
ENTROPY = (
    "algorithm.use_aug_entropy_loss=true algorithm.aug_entropy_loss_coef={0} "
    "algorithm.use_ori_entropy_loss=true algorithm.ori_entropy_loss_coef={0} "
)
FILTER = (
    "data.mini_rollout_batch_size=128 worker.actor.clip_ratio_low=0.2 worker.actor.clip_ratio_high=0.28 "
    "algorithm.disable_kl=true algorithm.online_filtering=true algorithm.filter_key=accuracy "
    "algorithm.filter_low=0.01 algorithm.filter_high=0.99 "
)
GEO = (
    "data.train_files=hiyouga/geometry3k@train data.val_files=hiyouga/geometry3k@test "
    "worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct trainer.n_gpus_per_node=8 "
)

# PAPO's scripts: command line -> what table 6 of the paper says: clip high, beta, gamma, eta1, eta2.
PAPO_COMMANDS = {
    "grpo 3B": ("config=examples/configs/config_grpo.yaml " + B3, (0.3, 0.01, None, 0.0, None)),
    "grpo 7B": (  # upstream's script lacks the last word, and so trains PAPO
        "config=examples/configs/config_grpo_papo.yaml " + B7 + "algorithm.use_kl_prcp=false",
        (0.3, 0.01, None, 0.0, None),
    ),
    "papo_g 3B": (
        "config=examples/configs/config_grpo_papo.yaml " + B3 + "algorithm.kl_prcp_coef=0.02",
        (0.3, 0.01, 0.02, 0.0, None),
    ),
    "papo_g 7B": (
        "config=examples/configs/config_grpo_papo.yaml " + B7 + "algorithm.kl_prcp_coef=0.02 " + ENTROPY.format(0.05),
        (0.3, 0.01, 0.02, 0.05, 0.05),
    ),
    "papo_g without KL 3B": (
        "config=examples/configs/config_grpo_papo.yaml "
        + B3
        + "algorithm.kl_prcp_coef=0.01 algorithm.disable_kl=true "
        + ENTROPY.format(0.03),
        (0.3, None, 0.01, 0.03, 0.03),
    ),
    "dapo 3B": ("config=examples/configs/config_dapo.yaml " + FILTER + B3, (0.28, None, None, 0.0, None)),
    "dapo 7B": ("config=examples/configs/config_dapo.yaml " + FILTER + B7, (0.28, None, None, 0.0, None)),
    "papo_d 7B": (
        "config=examples/configs/config_dapo_papo.yaml "
        + FILTER
        + B7
        + "algorithm.kl_prcp_coef=0.01 "
        + ENTROPY.format(0.03),
        (0.28, None, 0.01, 0.03, 0.03),
    ),
    "papo_g Qwen3 2B": (
        "config=examples/configs/config_grpo_papo.yaml "
        + PAPO
        + "worker.reward.reward_function=examples/reward_function/qwen3_vl_think.py:compute_score trainer.val_freq=-1 "
        "worker.actor.model.model_path=Qwen/Qwen3-VL-2B-Thinking trainer.n_gpus_per_node=4 "
        "algorithm.kl_prcp_coef=0.01",
        (0.3, 0.01, 0.01, 0.0, None),
    ),
    "one line": (
        "config=examples/config.yaml data.rollout_batch_size=384 algorithm.use_kl_prcp=true "
        "algorithm.kl_prcp_coef=0.02 algorithm.disable_kl=true " + B3,
        (0.3, None, 0.02, 0.0, None),
    ),
}

# EasyR1's scripts: command line -> some of what they set.
EASYR1_COMMANDS = {
    "geo3k_grpo": (
        "config=examples/config.yaml " + GEO + "trainer.experiment_name=qwen2_5_vl_7b_geo_grpo",
        {
            "algorithm.terms.ref_kl.coef": 0.01,
            "data.train_files": "hiyouga/geometry3k@train",
            "data.rollout_batch_size": 512,
            "data.max_response_length": 2048,
            "data.max_pixels": 4194304,
            "worker.rollout.tensor_parallel_size": 2,
            "worker.rollout.top_p": 0.99,
            "trainer.experiment_name": "qwen2_5_vl_7b_geo_grpo",
        },
    ),
    "geo3k_dapo": (
        "config=examples/config.yaml data.mini_rollout_batch_size=128 worker.actor.clip_ratio_low=0.2 "
        "worker.actor.clip_ratio_high=0.28 algorithm.disable_kl=True algorithm.online_filtering=True " + GEO,
        {
            "algorithm.online_filtering": True,
            "algorithm.filter_key": "overall",
            "algorithm.terms.policy.clip_ratio_high": 0.28,
            "data.mini_rollout_batch_size": 128,
        },
    ),
    "multi_image": (
        "config=examples/config.yaml data.train_files=hiyouga/journeybench-multi-image-vqa@train "
        "data.rollout_batch_size=256 worker.rollout.limit_images=2 trainer.n_gpus_per_node=8",
        {"worker.rollout.limit_images": 2, "data.rollout_batch_size": 256, "trainer.val_freq": 5},
    ),
    "qwen3_4b_math": (
        "config=examples/config.yaml data.max_response_length=4096 worker.actor.model.model_path=Qwen/Qwen3-4B",
        {"data.max_response_length": 4096, "worker.actor.model.model_path": "Qwen/Qwen3-4B"},
    ),
    "dapo17k": (
        "config=examples/config.yaml data.train_files=Saigyouji-Yuyuko1000/dapo17k@train data.max_prompt_length=2048 "
        "data.format_prompt=./examples/format_prompt/dapo.jinja data.max_response_length=20480 "
        "data.rollout_batch_size=512 data.mini_rollout_batch_size=1536 "
        "worker.actor.micro_batch_size_per_device_for_update=1 worker.actor.fsdp.torch_dtype=bf16 "
        "worker.actor.optim.strategy=adamw_bf16 worker.actor.optim.weight_decay=0.1 "
        "worker.actor.optim.lr_warmup_steps=10 worker.actor.global_batch_size=32 worker.actor.clip_ratio_dual=10.0 "
        "worker.rollout.n=16 worker.rollout.max_num_batched_tokens=22528 "
        """worker.rollout.val_override_config='{"n":16,"temperature":1.0,"top_p":0.7}' """
        "worker.reward.reward_function=./examples/reward_function/dapo.py:compute_score "
        """worker.reward.reward_function_kwargs='{"max_response_length":20480,"overlong_buffer_length":4096,"""
        """"overlong_penalty_factor":1.0}' algorithm.disable_kl=True algorithm.online_filtering=True """
        "algorithm.filter_key=accuracy_normalized trainer.max_try_make_batch=-1",
        {
            "worker.actor.optim.lr_warmup_steps": 160,  # 10 steps of 512 / 32 updates
            "worker.actor.optim.weight_decay": 0.1,
            "algorithm.terms.policy.clip_ratio_dual": 10.0,
            "worker.rollout.val_override_config.n": 16,
            "worker.rollout.val_override_config.top_p": 0.7,
            "worker.reward.reward_function_kwargs.overlong_buffer_length": 4096,
            "algorithm.filter_key": "accuracy_normalized",
        },
    ),
}


def run(line: str) -> Config:
    """What `python -m verl.trainer.main` makes of a command line."""
    return compose(parse(shlex.split(line)))


@pytest.mark.parametrize("name", PAPO_COMMANDS)
def test_papos_command_lines_give_the_papers_settings(name):
    line, expected = PAPO_COMMANDS[name]
    config = run(f"{line} {CONSOLE}")
    terms = config.algorithm.terms
    names = ("ref_kl", "perception_kl", "entropy", "masked_entropy")
    found = [terms[term].coef if term in terms else None for term in names]
    assert (terms["policy"].clip_ratio_low, terms["policy"].clip_ratio_high, *found) == (0.2, *expected)
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size, config.worker.rollout.n) == (
        384,
        128,
        5,
    )
    assert (config.data.max_prompt_length, config.data.max_response_length) == (4096, 2048)
    assert config.worker.rollout.top_p == 0.99 and config.worker.actor.optim.lr == 1e-6
    assert config.algorithm.adv_estimator == "grpo" and config.worker.actor.loss_avg_mode == "token"
    assert config.algorithm.online_filtering == ("dapo" in name or "papo_d" in name)
    if expected[2] is None:
        assert not config.algorithm.views
    else:  # as the released code: stored log-probs, raw pictures, one mask per prompt
        view, term = config.algorithm.views["masked"], terms["perception_kl"]
        assert (view.kind, view.patch_size, view.prob) == ("random_patch", 14, 0.6)
        assert (view.grad, view.stage, view.per, term.estimator) == (False, "raw", "prompt", "k3")
    assert check(config).inert == (("masked_entropy",) if expected[4] else ())


@pytest.mark.parametrize("name", EASYR1_COMMANDS)
def test_easyr1s_command_lines_give_their_settings(name):
    line, expected = EASYR1_COMMANDS[name]
    config = run(f"{line} {CONSOLE}")
    check(config)
    for key, value in expected.items():
        assert OmegaConf.select(OmegaConf.structured(config), key) == value, key


def test_the_translation_of_papos_7b_is_the_preset_that_says_so():
    """All loss terms and views, option by option."""
    line, _ = PAPO_COMMANDS["papo_g 7B"]
    overrides = ["+task=virl39k", "worker.actor.model.model_path=a", "data.val_batch_size=512"]
    preset = compose_config("papo_upstream", overrides)
    translated = run(line)
    assert translated.algorithm.terms == preset.algorithm.terms
    assert translated.algorithm.views == preset.algorithm.views
    assert translated.data == preset.data and translated.worker.actor.optim == preset.worker.actor.optim
    assert translated.worker.rollout.val_override_config.n == preset.worker.rollout.val_override_config.n
