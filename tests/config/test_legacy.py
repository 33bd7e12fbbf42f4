"""Old keys one by one: refused by name, said once, taken over beside new ones; and whole files converted."""

from __future__ import annotations

import logging
import shlex

import pytest

from papo.cli import main as papo
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.config.worker import LoRAConfig
from verl.legacy.rule import same
from verl.legacy.table import RULES, register_rules
from verl.legacy.translate import compose_legacy, translate, translate_overrides
from verl.trainer.main import compose, parse

pytestmark = pytest.mark.usefixtures("in_repository")


def run(line: str) -> Config:
    """What `python -m verl.trainer.main` makes of a command line."""
    return compose(parse(shlex.split(line)))


REFUSED = {
    "algorithm.use_kl_loss=false algorithm.kl_penalty=abs": "algorithm.kl_penalty=abs.*k.*low_var_kl",
    "algorithm.kl_penalty=mse": "algorithm.kl_penalty=mse",
    "algorithm.adv_estimator=gae worker.critic.padding_free=true": "worker.critic.padding_free=True",
    "algorithm.adv_estimator=gae worker.critic.model.lora.rank=1": "worker.critic.model.lora",
    "algorithm.kl_prcp_schedule=annealing": "kl_prcp_schedule=annealing.*schedule.shape=linear",
    "algorithm.kl_prcp_apply_mode=correct_only": "kl_prcp_apply_mode=correct_only.*incorrect_weight",
    "algorithm.use_kl_prcp=true algorithm.aug_config.noise=1": "algorithm.aug_config.noise=1",
    "algorithm.use_aug_entropy_loss=true": "use_aug_entropy_loss=True.*use_kl_prcp=true",
    "worker.actor.ulysses_size=2": "worker.actor.ulysses_size=2",
    "worker.actor.loss_type=sapo": "worker.actor.loss_type=sapo",
    "worker.actor.fsdp.mp_param_dtype=fp16": "worker.actor.fsdp.mp_param_dtype=fp16",
    "worker.rollout.val_override_config.max_tokens=9": "val_override_config.max_tokens=9",
    "trainer.val_freq=often": "trainer.val_freq=often: .*str",
    "worker.rollout.val_override_config=9": "worker.rollout.val_override_config=9: .*int",
    "worker.actor.optim.lr_warmup_steps=3 worker.actor.global_batch_size=0": "zero",
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
    overrides = [
        "worker.actor.padding_free=true",
        "trainer.save_best_checkpoint=true",
        "worker.actor.clip_ratio_high=0.28",
    ]
    with caplog.at_level(logging.INFO, logger="verl"):
        translate("examples/config.yaml", overrides)
    lines = [record.getMessage() for record in caplog.records]
    for said in (
        "worker.actor.padding_free=true: how rows are padded changes no result",
        "trainer.save_best_checkpoint=true -> trainer.save_best=val/reward",
        "worker.actor.clip_ratio_high=0.28 -> term@algorithm.terms.policy=policy",
        "algorithm.use_kl_loss=true, algorithm.kl_penalty=low_var_kl, algorithm.kl_coef=0.01 -> term@algorithm.terms.r",
        "examples/config.yaml does not set, so EasyR1's and PAPO's defaults hold: data.rollout_batch_size=512",
    ):
        assert sum(said in line for line in lines) == 1, said
    assert not any("data.train_files" in line for line in lines)


def test_saving_and_resuming():
    saving = "trainer.save_freq=5 trainer.save_limit=3 trainer.save_model_only=true trainer.save_best_checkpoint=true"
    trainer = compose_legacy("examples/config.yaml", saving.split()).trainer
    assert (trainer.save_freq, trainer.save_limit, trainer.save_model_only) == (5, 3, True)
    assert (trainer.save_best, trainer.resume) == ("val/reward", "auto")
    upstream = ["trainer.save_freq=-1", "trainer.save_limit=-1", "trainer.find_last_checkpoint=false"]
    trainer = compose_legacy("examples/config.yaml", upstream).trainer
    assert (trainer.save_freq, trainer.save_limit, trainer.save_best, trainer.resume) == (0, 0, None, "never")
    named = ["trainer.load_checkpoint_path=a/global_step_5"]
    assert compose_legacy("examples/config.yaml", named).trainer.resume == "a/global_step_5"


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


def test_a_kl_in_the_reward_and_a_critic():
    config = compose_legacy(
        "examples/config.yaml",
        "algorithm.use_kl_loss=false algorithm.kl_penalty=kl algorithm.kl_coef=0.002 algorithm.kl_type=adaptive "
        "algorithm.kl_horizon=500.0 algorithm.adv_estimator=gae algorithm.lam=0.95 trainer.critic_warmup=3 "
        "worker.critic.optim.lr=2e-6 worker.critic.cliprange_value=0.3 worker.critic.model.model_path=c "
        "worker.critic.offload.offload_params=true worker.critic.offload.offload_optimizer=false".split(),
    )
    kl, critic = config.algorithm.reward_kl, config.worker.critic
    assert (kl.coef, kl.estimator, kl.controller, kl.horizon, kl.target) == (0.002, "k1", "adaptive", 500, 0.1)
    assert "ref_kl" not in config.algorithm.terms
    assert (config.algorithm.adv_estimator, config.algorithm.lam, config.trainer.critic_warmup) == ("gae", 0.95, 3)
    assert (critic.optim.lr, critic.cliprange_value, critic.model_path) == (2e-6, 0.3, "c")
    assert critic.fsdp.offload == "between_phases"


@pytest.mark.parametrize("role", ["actor", "ref"])
def test_states_in_main_memory_between_phases_or_always(role):
    """Upstream's `offload` parks states between phases: the optimizer's step stays on the GPU."""
    other = "ref" if role == "actor" else "actor"
    parked = [f"worker.{role}.offload.offload_params=true", f"worker.{role}.offload.offload_optimizer=true"]
    worker = compose_legacy("examples/config.yaml", parked).worker
    assert getattr(worker, role).fsdp.offload == "between_phases" and getattr(worker, other).fsdp.offload == "none"
    line = [f"worker.{role}.fsdp.enable_cpu_offload=true", "worker.actor.optim.strategy=adamw_bf16"]
    worker = compose_legacy("examples/config.yaml", line).worker
    assert getattr(worker, role).fsdp.offload == "always" and getattr(worker, other).fsdp.offload == "none"
    assert worker.actor.optim.strategy == "adamw_bf16" and worker.critic.optim.strategy == "adamw"
    assert translate_overrides([*parked, *line]) == [f'worker.{role}.fsdp.offload="always"', line[1]]


def test_lora():
    lora = "worker.actor.model.lora"
    config = compose_legacy("examples/config.yaml", [f"{lora}.rank=64"])
    assert config.worker.actor.model.lora == LoRAConfig(rank=64, alpha=16, target_modules="all-linear")
    assert config.worker.actor_is_reference and "ref_kl" in config.algorithm.terms
    names = [f"{lora}.rank=8", f"{lora}.alpha=32", f'{lora}.target_modules="q_proj, v_proj"']
    config = compose_legacy("examples/config.yaml", names)
    assert config.worker.actor.model.lora == LoRAConfig(rank=8, alpha=32, target_modules=["q_proj", "v_proj"])


def test_old_files_take_new_keys_and_hydras_own():
    config = compose_legacy(
        "examples/config.yaml",
        [
            "trainer.device=cpu",
            "algorithm.terms.ref_kl.coef=0.5",
            "+term@algorithm.terms.extra=entropy",
            "trainer.val_freq=-1",
            "worker.reward.reward_function=examples/reward_function/math.py",
            "worker.reward.reward_type=sequential",
        ],
    )
    assert config.trainer.device == "cpu" and config.algorithm.terms["ref_kl"].coef == 0.5
    assert config.algorithm.terms["extra"].kind == "entropy" and config.trainer.val_freq == 0
    assert config.worker.reward.reward_function.endswith("math.py:main")
    assert config.worker.reward.reward_type == "sequential"


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
    assert (actor.optim.strategy, actor.fsdp.offload) == ("adamw_bf16", "between_phases")
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
