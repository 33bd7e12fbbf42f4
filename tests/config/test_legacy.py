"""Command lines and YAML files of EasyR1 and PAPO give the settings that they gave there, or are refused by name."""

from __future__ import annotations

import logging
import shlex

import pytest
from omegaconf import OmegaConf

from papo.cli import main as papo
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.config.legacy import compose_legacy, translate, translate_overrides
from verl.config.legacy_rule import same
from verl.config.legacy_table import RULES, register_rules
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


REFUSED = {
    "algorithm.use_kl_loss=false": "algorithm.use_kl_loss=False.*no part of the reward",
    "algorithm.kl_penalty=mse": "algorithm.kl_penalty=mse",
    "algorithm.adv_estimator=gae": "algorithm.adv_estimator=gae",
    "algorithm.kl_prcp_schedule=annealing": "kl_prcp_schedule=annealing.*schedule.shape=linear",
    "algorithm.kl_prcp_apply_mode=correct_only": "kl_prcp_apply_mode=correct_only.*incorrect_weight",
    "algorithm.use_kl_prcp=true algorithm.aug_config.noise=1": "algorithm.aug_config.noise=1",
    "algorithm.use_aug_entropy_loss=true": "use_aug_entropy_loss=True.*use_kl_prcp=true",
    "worker.actor.ulysses_size=2": "worker.actor.ulysses_size=2",
    "worker.actor.loss_type=sapo": "worker.actor.loss_type=sapo",
    "worker.actor.optim.lr_warmup_ratio=0.1": "lr_warmup_ratio=0.1.*lr_warmup_steps",
    "worker.actor.model.lora.rank=64": "worker.actor.model.lora.rank=64",
    "worker.actor.fsdp.mp_param_dtype=fp16": "worker.actor.fsdp.mp_param_dtype=fp16",
    "worker.rollout.ignore_eos=true": "worker.rollout.ignore_eos=True",
    "worker.rollout.val_override_config.max_tokens=9": "val_override_config.max_tokens=9",
    "worker.reward.reward_type=sequential": "worker.reward.reward_type=sequential.*list",
    "trainer.load_checkpoint_path=a/global_step_5": "trainer.load_checkpoint_path=a/global_step_5.*model_path",
    "trainer.critic_warmup=5": "trainer.critic_warmup=5",
    "trainer.val_freq=often": "trainer.val_freq=often: .*str",
    "worker.rollout.val_override_config=9": "worker.rollout.val_override_config=9: .*int",
    "worker.actor.global_batch_size=0": "zero",
    "trainer.n_gpus_per_node=many": "'many'",
    "data.override_chat_template=x": "data.override_chat_template=x.*chat_template.jinja",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_has_no_meaning_here_is_refused_by_name(override):
    with pytest.raises(ValueError, match=f"{REFUSED[override]}"):
        compose_legacy("examples/config.yaml", override.split())


def test_unknown_keys_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="'trainer.save_frq' is no key of EasyR1"):
        compose_legacy("examples/config.yaml", ["trainer.save_frq=5"])
    with pytest.raises(FileNotFoundError, match="config=examples/nowhere.yaml"):
        compose_legacy("examples/nowhere.yaml")
    with pytest.raises(ValueError, match="is a preset of this framework"):
        compose_legacy("configs/grpo.yaml")
    for text, message in (("- a\n", "no mapping"), ("a: [\n", "no YAML")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            compose_legacy(str(tmp_path / "a.yaml"))


def test_each_key_is_said_once_and_none_in_silence(caplog):
    """What changes its name or has no effect is a line; what is the same is none; defaults that fill in are one."""
    overrides = ["worker.actor.padding_free=true", "trainer.save_freq=5", "worker.actor.clip_ratio_high=0.28"]
    with caplog.at_level(logging.INFO, logger="verl"):
        translate("examples/config.yaml", overrides)
    lines = [record.getMessage() for record in caplog.records]
    for said in (
        "worker.actor.padding_free=true: how rows are padded changes no result",
        "trainer.save_freq=5: this version saves the model once",
        "worker.actor.clip_ratio_high=0.28 -> term@algorithm.terms.policy=policy",
        "algorithm.use_kl_loss=true, algorithm.kl_penalty=low_var_kl, algorithm.kl_coef=0.01 -> term@algorithm.terms.r",
        "examples/config.yaml does not set, so EasyR1's and PAPO's defaults hold: data.rollout_batch_size=512",
    ):
        assert sum(said in line for line in lines) == 1, said
    assert not any("data.train_files" in line for line in lines)


def test_clipping_token_selection_imitation_and_average():
    config = compose_legacy(
        "examples/configs/config_grpo_papo.yaml",
        "algorithm.kl_prcp_coef=0.02 algorithm.use_kl_prcp_clipping=true algorithm.kl_prcp_clipping=0.3 "
        "algorithm.use_kl_prcp_token_level_mask=true algorithm.kl_prcp_token_level_mask_top_p=0.25 "
        "algorithm.kl_prcp_penalty=mse algorithm.use_sft_loss=true algorithm.sft_loss_coef=0.1 "
        "algorithm.loss_avg_mode=seq worker.actor.loss_type=cispo worker.actor.optim.warmup_style=cosine".split(),
    )
    terms = config.algorithm.terms
    kl = terms["perception_kl"]
    # The mean over a quarter of the tokens, where upstream divides their sum by all.
    assert (kl.cap, kl.top_fraction, kl.coef, kl.estimator) == (0.3, 0.25, 0.005, "k2")
    assert terms["sft"].coef == 0.1 and terms["policy"].kind == "cispo" and terms["policy"].clip_ratio_low == 0.2
    assert config.worker.actor.loss_avg_mode == "seq" and config.worker.actor.optim.lr_scheduler_type == "cosine"


def test_old_files_take_new_keys_and_hydras_own():
    config = compose_legacy(
        "examples/config.yaml",
        [
            "trainer.device=cpu",
            "algorithm.terms.ref_kl.coef=0.5",
            "+term@algorithm.terms.extra=entropy",
            "trainer.val_freq=-1",
            "worker.reward.reward_function=examples/reward_function/math.py",
        ],
    )
    assert config.trainer.device == "cpu" and config.algorithm.terms["ref_kl"].coef == 0.5
    assert config.algorithm.terms["extra"].kind == "entropy" and config.trainer.val_freq == 0
    assert config.worker.reward.reward_function.endswith("math.py:main")


def test_presets_take_old_names_that_are_one_key_here(caplog):
    old = ["algorithm.kl_prcp_coef=0.03", "algorithm.aug_config.black_prob=0.5", "worker.actor.padding_free=true"]
    with caplog.at_level(logging.INFO, logger="verl"):
        new = translate_overrides(old)
    assert new == ["algorithm.terms.perception_kl.coef=0.03", "algorithm.views.masked.prob=0.5"]
    assert "algorithm.kl_prcp_coef=0.03 -> algorithm.terms.perception_kl.coef=0.03" in caplog.text
    assert "worker.actor.padding_free=true: how rows are padded changes no result" in caplog.text
    config = run(
        "--config-name papo_grpo worker.actor.model.model_path=a worker.actor.clip_ratio_high=0.4 "
        "worker.ref.fsdp.enable_full_shard=false trainer.max_steps=7"
    )
    assert config.algorithm.terms["policy"].clip_ratio_high == 0.4 and config.trainer.max_steps == 7
    assert config.worker.ref.fsdp.reshard_after_forward is False
    with pytest.raises(ValueError, match="use_kl_prcp=true.*Begin with a preset that has them"):
        translate_overrides(["algorithm.use_kl_prcp=true"])
    with pytest.raises(ValueError, match="worker.actor.ulysses_size=2"):
        translate_overrides(["worker.actor.ulysses_size=2"])


def test_new_command_lines_are_untouched():
    words = [
        "trainer.val_freq=-1",
        "+task=digits",
        "~term@algorithm.terms.ref_kl",
        "term@algorithm.terms.policy=gspo",
        "algorithm.terms.perception_kl.coef=0.03",
        "algorithm.views.masked.prob=0.5",
        "worker.rollout.engine_kwargs={a: 1}",
        "+trainer.bogus=1",
        "bogus=1",
    ]
    assert translate_overrides(words) == words


@pytest.mark.parametrize("line", ["", "trainer.max_steps=1", "--config-name grpo config=a.yaml", "config=a config=b"])
def test_one_config_is_named(line, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert "one of --config-name NAME and config=FILE.yaml" in capsys.readouterr().err


def test_a_key_has_one_row():
    with pytest.raises(ValueError, match="'data.shuffle' has a row already"):
        register_rules([same("data.shuffle", True)])
    assert {"algorithm.use_kl_prcp", "algorithm.use_kl_loss"} <= {key for rule in RULES for key in rule.defaults}


OLD = """
data:
  train_files: train.parquet
  val_files: val.parquet
  prompt_key: question
  max_prompt_length: 1024
  max_response_length: 512
  rollout_batch_size: 64
  seed: 7
algorithm:
  adv_estimator: rloo
  use_kl_loss: true
  kl_penalty: low_var_kl
  kl_coef: 0.005
  use_kl_prcp: true
  kl_prcp_penalty: low_var_kl
  kl_prcp_coef: 0.015
  kl_prcp_schedule: fixed
  kl_prcp_schedule_args: {start_value: 0.01, end_value: 0.0, annealing_ratio: 0.5}
  aug_config: {patch_size: 16, black_prob: 0.7}
  use_ori_entropy_loss: true
  ori_entropy_loss_coef: 0.02
worker:
  actor:
    global_batch_size: 32
    clip_ratio_high: 0.25
    padding_free: true
    offload: {offload_params: true, offload_optimizer: true}
    model: {model_path: some/model, trust_remote_code: true}
    optim: {lr: 2.0e-6, strategy: adamw_bf16, lr_warmup_steps: 5}
    fsdp: {torch_dtype: bf16, enable_full_shard: false}
  rollout:
    n: 4
    val_override_config: {n: 8, temperature: 0.5}
  reward:
    reward_type: batch
    reward_function: examples/reward_function/math.py:compute_score
    reward_function_kwargs: {format_weight: 0.3}
trainer:
  logger: [console, file]
  save_checkpoint_path: checkpoints/here
  save_freq: 5
  val_freq: -1
"""


def test_a_converted_file_composes_to_the_same_config(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(OLD)
    overrides = ["algorithm.kl_prcp_coef=0.01", "trainer.n_gpus_per_node=4"]
    papo(["convert-config", str(tmp_path / "old.yaml"), *overrides])
    (tmp_path / "new.yaml").write_text(capsys.readouterr().out)
    translated = compose_legacy(str(tmp_path / "old.yaml"), overrides)
    assert compose_config("new", config_dir=str(tmp_path)) == translated
    assert run(f"--config-dir {tmp_path} --config-name new") == translated

    terms, view, actor = translated.algorithm.terms, translated.algorithm.views["masked"], translated.worker.actor
    assert {name: term.coef for name, term in terms.items()} == {
        "policy": 1.0,
        "ref_kl": 0.005,
        "perception_kl": 0.01,
        "entropy": 0.02,
    }
    assert (view.patch_size, view.prob) == (16, 0.7) and terms["policy"].clip_ratio_high == 0.25
    assert translated.algorithm.adv_estimator == "rloo" and translated.data.prompt_key == "question"
    assert (translated.data.seed, translated.worker.rollout.seed) == (7, 1)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.model.trust_remote_code) == (2e-6, 10, True)
    assert (actor.fsdp.reshard_after_forward, translated.worker.ref.fsdp.reshard_after_forward) == (False, True)
    sampling = translated.worker.rollout.val_override_config
    assert (sampling.n, sampling.temperature, sampling.top_p) == (8, 0.5, None)
    assert translated.worker.reward.reward_function_kwargs == {"format_weight": 0.3}
    assert (translated.trainer.logger, translated.trainer.val_freq) == (["console", "jsonl"], 0)
    assert translated.trainer.output_dir == "checkpoints/here" and translated.trainer.total_epochs == 15
    assert translated.data.min_pixels == 262144  # upstream's default, where the file is silent


def test_convert_config_ends_in_one_line_where_it_cannot(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(OLD)
    for word, named in (("~term@algorithm.terms.ref_kl", "give them to the run"), ("a.b=1", "'a.b' is no key")):
        with pytest.raises(SystemExit, match=named):
            papo(["convert-config", str(tmp_path / "old.yaml"), word])
    assert capsys.readouterr().out == ""
