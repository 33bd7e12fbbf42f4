"""Presets compose, and misuse is refused with the key, the value and a way out."""

from __future__ import annotations

import logging

import pytest

from tests.fakes.readme import readme_term
from verl.algorithms.losses.compose import build_terms
from verl.config.algorithm import ScheduleConfig, Shape
from verl.config.compose import compose_config, presets
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import RewardFunctionConfig
from verl.trainer.plan import check, log_requirements, make_paths_absolute
from verl.workers.rollout import engines

PATHS = ["data.train_files=a.parquet", "data.val_files=b.parquet", "worker.actor.model.model_path=somewhere"]

pytestmark = pytest.mark.usefixtures("in_repository")


def preset(name: str = "papo_grpo", *overrides: str) -> Config:
    return compose_config(name, [*PATHS, *overrides])


@pytest.mark.parametrize("name", presets())
def test_every_preset_composes_and_is_valid(name):
    config = preset(name)
    check(config)
    assert config.trainer.output_dir == f"outputs/{config.trainer.project_name}/{config.trainer.experiment_name}"


def test_every_preset_has_a_folder_of_its_own():
    folders = {preset(name).trainer.output_dir for name in presets()}
    assert len(folders) == len(presets()) and preset("dapo").trainer.output_dir == "outputs/papo/dapo"
    assert preset("dapo", "trainer.experiment_name=mine").trainer.output_dir == "outputs/papo/mine"


def test_presets_hold_what_the_paper_says():
    papo, grpo = preset("papo_grpo"), preset("grpo")
    terms = papo.algorithm.terms
    assert (terms["perception_kl"].coef, terms["entropy"].coef, terms["masked_entropy"].coef) == (0.02, 0.05, 0.05)
    assert terms["ref_kl"].coef == 0.01 and terms["masked_entropy"].view == "masked"
    assert (terms["policy"].clip_ratio_low, terms["policy"].clip_ratio_high, terms["policy"].clip_ratio_dual) == (
        0.2,
        0.3,
        3,
    )
    mask = papo.algorithm.views["masked"]
    assert (mask.kind, mask.patch_size, mask.prob, mask.grad) == ("random_patch", 14, 0.6, False)
    assert not grpo.algorithm.views and "perception_kl" not in grpo.algorithm.terms
    assert (papo.data.rollout_batch_size, papo.worker.rollout.n, papo.worker.actor.global_batch_size) == (384, 5, 128)
    assert papo.worker.actor.optim.lr == 1e-6 and papo.worker.actor.optim.weight_decay == 1e-2


@pytest.mark.parametrize(
    "kind, option",
    [("grid", "prob=0.3"), ("block", "prob=0.3"), ("blank", "color=red"), ("precomputed", "column=hints")],
)
def test_another_masking_is_one_override(kind, option):
    where = "algorithm.views.masked"
    config = preset(
        "papo_grpo", f"view@{where}={kind}", f"{where}.{option}", f"{where}.stage=resized", f"{where}.per=response"
    )
    check(config)
    view = config.algorithm.views["masked"]
    assert (view.kind, view.grad, view.stage, view.per) == (kind, False, "resized", "response")
    name, value = option.split("=")
    assert str(getattr(view, name)) == value
    with pytest.raises(ValueError, match="per"):
        preset("papo_grpo", f"{where}.per=batch")


def test_papo_needs_reference_and_a_view_and_a_term_removed_takes_its_pass_along():
    found = check(preset("papo_grpo_live"))
    assert found.reference and found.live_views == ("masked",) and found.inert == ()
    found = check(preset("papo_grpo"))
    assert found.reference and found.stored_views == ("masked",) and found.inert == ("masked_entropy",)
    found = check(preset("papo_grpo", "~term@algorithm.terms.ref_kl"))
    assert not found.reference


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
def test_another_policy_loss_takes_the_place_of_the_clipped_one(kind):
    overrides = ["algorithm.adv_estimator=dr_grpo", "worker.actor.loss_avg_mode=seq_sum"]
    config = preset("papo_grpo", f"term@algorithm.terms.policy={kind}", *overrides)
    assert check(config).old and config.algorithm.terms["policy"].kind == kind


def test_one_seed_reaches_everything_unless_it_is_given_apart():
    config = preset("papo_grpo", "trainer.seed=7", "data.seed=9")
    assert (config.worker.rollout.seed, config.data.seed) == (7, 9)


def test_a_term_that_can_give_no_gradient_is_reported_by_name(caplog):
    config = preset("papo_grpo")
    with caplog.at_level(logging.INFO, logger="verl"):
        log_requirements(config, check(config))
    assert "loss term 'masked_entropy' has coefficient 0.05 and can give no gradient" in caplog.text
    assert "log-probs of view 'masked' (no gradient)" in caplog.text


def test_the_batch_arithmetic_in_words():
    config = preset("papo_grpo", "trainer.n_gpus_per_node=4")
    words = compute_sizes(config).in_words()
    assert "384 prompts x 5 responses = 1920 responses" in words
    assert "384 prompts / 128 prompts per update = 3" in words
    assert "640 responses on 4 rank(s), in micro-batches of at most 16384 computed tokens" in words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.rollout_batch_siez=3", "no key data.rollout_batch_siez: did you mean data.rollout_batch_size or"),
        ("rollout.n=3", "no key rollout.n: did you mean worker.rollout.n or"),
        ("algorithm.terms.perception_kl.gamma=1", "no key algorithm.terms.perception_kl.gamma: did you mean"),
        ("data.rollout_batch_size=many", "data.rollout_batch_size=many: .* could not be converted to Integer"),
        ("worker.actor.loss_avg_mode=tokens", "loss_avg_mode=tokens: .*expected one of .token, seq, seq_sum"),
        ("+term@algorithm.terms.x=perception_lk", "no term 'perception_lk': did you mean perception_kl"),
        ("view@algorithm.views.masked=gird", "no view 'gird': did you mean grid"),
        ("trainer.logger=[", r"trainer.logger=\[: no viable alternative"),
    ],
)
def test_what_does_not_compose_names_the_key(override, message):
    with pytest.raises(ValueError, match=message) as raised:
        preset("papo_grpo", override)
    assert "\n" not in str(raised.value)


def test_unknown_presets_and_missing_values_are_named():
    with pytest.raises(ValueError, match="no preset 'papo_gpro'.*did you mean papo_grpo"):
        preset("papo_gpro")
    with pytest.raises(ValueError, match="there is no preset in /nowhere"):
        compose_config("grpo", config_dir="/nowhere")
    with pytest.raises(ValueError, match="need a value: worker.actor.model.model_path"):
        compose_config("grpo", ["data.val_files=b"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["worker.actor.global_batch_size=100"], "not a multiple of worker.actor.global_batch_size=100.*Try .*=96"),
        (["trainer.n_gpus_per_node=8", "trainer.nnodes=100"], "640 responses, fewer than the 800 ranks"),
        (["worker.rollout.n=1"], "worker.rollout.n=1: grpo compares"),
        (["worker.rollout.n=1", "algorithm.adv_estimator=rloo"], "worker.rollout.n=1: rloo compares"),
        (["worker.rollout.temperature=0"], "worker.rollout.temperature=0.0: a value above 0"),
        (["worker.rollout.top_p=1.5"], "worker.rollout.top_p=1.5"),
        (["worker.rollout.top_k=0"], "worker.rollout.top_k=0"),
        (
            ["worker.rollout.val_override_config.temperature=0", "worker.rollout.val_override_config.n=4"],
            "val_override_config.temperature=0 takes the likeliest token, so its n=4 .*val_override_config.n=1",
        ),
        (["worker.actor.optim.lr_warmup_ratio=1.5"], "optim.lr_warmup_ratio=1.5: a value from 0 to 1"),
        (["worker.actor.max_tokens_per_micro_batch=0"], "max_tokens_per_micro_batch=0: a value above 0"),
        (["worker.actor.model.lora.rank=-1"], "lora.rank=-1: 0 or more"),
        (["worker.actor.model.lora.alpha=0"], "lora.alpha=0: a value above 0"),
        (["worker.actor.model.lora.target_modules=[]"], "lora.target_modules=.*all-linear, or a list of names"),
        (["worker.actor.model.lora.target_modules=[q_proj,3]"], r"lora.target_modules=\['q_proj', 3\]: all-linear"),
        (["worker.actor.model.lora.target_modules='*_proj'"], r"target_modules: '\*_proj' is no regular expression"),
        (
            ["worker.actor.model.lora.vision_tower=true", "worker.actor.model.freeze_vision_tower=true"],
            "lora.vision_tower=true trains what worker.actor.model.freeze_vision_tower=true freezes",
        ),
        (["data.min_pixels=9", "data.max_pixels=8"], "data.min_pixels=9 is above data.max_pixels=8"),
        (["data.val_files=null"], "data.val_files is not set"),
        (["data.val_files=null", "trainer.val_only=true"], "data.val_files is not set, and trainer.val_only"),
        (["data.train_files=null"], "data.train_files is not set"),
        (["worker.rollout.name=sglang"], "unknown rollout engine .* 'sglang'; known: hf, vllm"),
        (["worker.rollout.name=hf", "worker.rollout.tensor_parallel_size=2"], "the engine hf runs on one GPU"),
        (["worker.rollout.val_override_config.top_p=0"], "val_override_config.top_p=0"),
        (["worker.rollout.val_override_config.temperature=-1"], "config.temperature=-1.0: 0 or more, or null"),
        (["worker.rollout.val_override_config.n=0"], "val_override_config.n=0"),
        (["worker.rollout.gpu_memory_utilization=1.2"], "gpu_memory_utilization=1.2"),
        (["worker.rollout.limit_images=-1"], "limit_images=-1"),
        (["worker.rollout.data_parallel_size=0"], "data_parallel_size=0"),
        (["worker.rollout.max_model_len=6143"], "max_model_len=6143 is below .* = 6144"),
        (["algorithm.filter_low=1"], "algorithm.filter_low=1.0 is not below algorithm.filter_high=0.99"),
        (["algorithm.overlong_buffer=2049"], "algorithm.overlong_buffer=2049: from 0"),
        (["data.mini_rollout_batch_size=128"], "data.mini_rollout_batch_size=128: only with .*online_filtering"),
        (["algorithm.old_log_probs=rollout", "algorithm.terms.policy.tis=token"], "terms.policy.tis corrects"),
        (["algorithm.watchdog.window=0"], "algorithm.watchdog.window=0"),
        (["algorithm.watchdog.reduce_factor=1"], "algorithm.watchdog.reduce_factor=1.0"),
        (["worker.rollout.max_failures=0"], "max_failures=0"),
        (["worker.reward.num_workers=0"], "worker.reward.num_workers=0: 1 or more, or null"),
        (["worker.reward.timeout_s=0"], "worker.reward.timeout_s=0.0: a value above 0"),
        (["worker.reward.max_failure_frac=1"], "worker.reward.max_failure_frac=1.0: a value from 0 to below 1"),
        (["worker.reward.weight=nan"], "worker.reward.weight=nan: a finite number"),
        (
            ["+reward@worker.reward.extra.main=function", "worker.reward.extra.main.reward_function=a"],
            "worker.reward.extra.main: choose a name",
        ),
        (["algorithm.adv_estimator=gea"], "unknown advantage estimator .* 'gea'"),
        (["algorithm.gamma=1.1"], "algorithm.gamma=1.1: a value from 0 to 1"),
        (["algorithm.reward_kl.coef=-1"], "algorithm.reward_kl.coef=-1.0: 0 or more"),
        (["algorithm.reward_kl.estimator=full"], "algorithm.reward_kl.estimator=full: .* k1, k2 or k3"),
        (["algorithm.reward_kl.horizon=0"], "algorithm.reward_kl.horizon=0: a value above 0"),
        (
            ["+shaper@algorithm.shapers.vppo=tokens", "algorithm.shapers.vppo.top_fraction=0"],
            "algorithm.shapers.vppo.top_fraction=0.0: a value above 0 and at most 1",
        ),
        (
            ["+shaper@algorithm.shapers.vppo=tokens", "algorithm.shapers.vppo.view=blurred"],
            "algorithm.shapers.vppo reads the column 'blurred_rows', and nothing makes it",
        ),
        (["algorithm.terms.perception_kl.coef=-0.01"], "algorithm.terms.perception_kl.coef=-0.01"),
        (["algorithm.terms.perception_kl.view=blurred"], "reads the column 'blurred_log_probs'"),
        (["algorithm.terms.policy.clip_ratio_low=1.2"], "algorithm.terms.policy.clip_ratio_low=1.2"),
        (["algorithm.views.masked.prob=2"], "algorithm.views.masked.prob=2"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["trainer.val_generations_to_log=-1"], "trainer.val_generations_to_log=-1"),
        (["trainer.logger=[comet]"], "unknown tracker .* 'comet'"),
        ([f"algorithm.terms.{t}.coef=0" for t in ("policy", "ref_kl", "perception_kl", "entropy", "masked_entropy")],
         "nothing to train on"),
    ],
)  # fmt: skip
def test_values_that_have_no_meaning_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(preset("papo_grpo", *overrides))


def test_further_rewards_are_a_few_overrides(in_repository, tmp_path):
    short = "worker.reward.extra.short"
    added = [f"+reward@{short}=function", f"{short}.reward_function=examples/reward_function/choice.py:compute_score"]
    options = [f"{short}.weight=0.2", f"+{short}.reward_function_kwargs.format_weight=0.5"]
    main = ["worker.reward.weight=0.8", "worker.reward.reward_type=sequential"]
    config = preset("grpo", *added, *options, *main)
    make_paths_absolute(config)
    reward = config.worker.reward
    assert list(reward.functions()) == ["worker.reward", short]
    extra = reward.extra["short"]
    assert (reward.weight, reward.reward_type, extra.reward_type) == (0.8, "sequential", "batch")
    assert (extra.weight, extra.reward_function_kwargs) == (0.2, {"format_weight": 0.5})
    for part, name in ((reward, "math"), (extra, "choice")):
        assert part.reward_function == f"{in_repository}/examples/reward_function/{name}.py:compute_score"

    with pytest.raises(ValueError, match=f"{short}.reward_function"):
        preset("grpo", added[0])
    with pytest.raises(ValueError, match="wieght"):
        preset("grpo", *added, f"{short}.wieght=0.2")
    text = "defaults: [schema, _self_]\nworker: {reward: {extra: {short: {reward_function: 'a.py:f', weight: 0.2}}}}\n"
    (tmp_path / "own.yaml").write_text(text)
    own = compose_config("own", [*PATHS, "worker.reward.reward_function=b.py:f"], str(tmp_path)).worker.reward
    assert own.extra == {"short": RewardFunctionConfig("a.py:f", weight=0.2)}


def test_a_mistyped_template_is_named():
    with pytest.raises(FileNotFoundError, match="data.format_prompt='.*maths.jinja': there is no such file"):
        check(preset("papo_grpo", "data.format_prompt=examples/maths.jinja"))


def test_a_loss_term_in_a_users_file_is_ten_lines(tmp_path, monkeypatch):
    """The example of configs/README.md, as it stands there."""
    source = readme_term()
    (tmp_path / "my_terms.py").write_text(source)
    monkeypatch.setenv("VERL_PLUGINS", str(tmp_path / "my_terms.py"))
    config = preset("papo_grpo", "+term@algorithm.terms.confident=confidence", "algorithm.terms.confident.coef=0.1")
    assert check(config).inert == ("masked_entropy",)  # of a stored view
    assert len([line for line in source.splitlines() if line.strip()]) <= 12


def test_a_plugin_file_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("VERL_PLUGINS", "/nowhere/terms.py")
    with pytest.raises(FileNotFoundError, match="VERL_PLUGINS names '/nowhere/terms.py'"):
        preset()


def test_validation_alone_needs_no_training_data():
    check(preset("papo_grpo", "data.train_files=null", "trainer.val_only=true"))


def test_the_engine_is_vllm_where_it_is_installed_and_a_missing_one_is_refused(caplog, monkeypatch):
    for installed, name in ((True, "vllm"), (False, "hf")):
        monkeypatch.setattr(engines, "is_installed", lambda name, installed=installed: installed or name == "hf")
        config = preset("papo_grpo")
        with caplog.at_level(logging.INFO, logger="verl"):
            check(config)
        assert config.worker.rollout.name == name and f"rollout engine: {name}" in caplog.text
    with pytest.raises(ValueError, match="worker.rollout.name=vllm, and vllm is not installed: run .*install.sh"):
        check(preset("papo_grpo", "worker.rollout.name=vllm"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(), {1: 1.0, 50: 1.0, 100: 1.0}),
        (ScheduleConfig(warmup_steps=4), {1: 0.2, 4: 0.8, 5: 1.0, 100: 1.0}),
        (ScheduleConfig(Shape.linear, end=0.0), {1: 1.0, 50: 1 - 49 / 99, 100: 0.0}),
        (ScheduleConfig(Shape.linear, end=3.0, steps=11), {1: 1.0, 6: 2.0, 11: 3.0, 100: 3.0}),
        (ScheduleConfig(Shape.cosine, end=0.5, steps=21, warmup_steps=10), {5: 5 / 11, 11: 1.0, 16: 0.75, 21: 0.5}),
    ],
)
def test_schedules_are_functions_of_the_step(schedule, expected):
    for step, factor in expected.items():
        assert schedule.factor(step, 100) == pytest.approx(factor)


def test_a_schedule_is_set_like_everything_else_and_checked():
    config = preset(
        "papo_grpo",
        "algorithm.terms.perception_kl.schedule.shape=linear",
        "algorithm.terms.perception_kl.schedule.steps=100",
    )
    (term,) = [t for t in build_terms(config.algorithm.terms) if t.name == "perception_kl"]
    assert term.coef(1, 200) == 0.02 and term.coef(100, 200) == 0.0
    for override, message in (
        ("perception_kl.schedule.end=-1", "perception_kl.schedule.end=-1"),
        ("entropy.schedule.steps=0", "entropy.schedule.steps=0"),
        ("perception_kl.top_fraction=0", "perception_kl.top_fraction=0"),
        ("perception_kl.cap=-1", "perception_kl.cap=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            check(preset("papo_grpo", f"algorithm.terms.{override}"))


# What table 6 of the paper says: clip high, beta, gamma, eta1, eta2 (None: the term is absent).
TABLE_6 = {
    "grpo": (0.3, 0.01, None, 0.0, None),
    "dapo": (0.28, None, None, 0.0, None),
    "papo_grpo": (0.3, 0.01, 0.02, 0.05, 0.05),
    "papo_grpo_live": (0.3, 0.01, 0.02, 0.05, 0.05),
    "papo_grpo_3b": (0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo_no_kl_ref": (0.3, None, 0.01, 0.03, 0.03),
    "papo_dapo": (0.28, None, 0.01, 0.03, 0.03),
    "papo_upstream": (0.3, 0.01, 0.02, 0.05, 0.05),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_presets_have_the_papers_settings(name):
    config = preset(name)
    terms = config.algorithm.terms
    coefs = [terms[t].coef if t in terms else None for t in ("ref_kl", "perception_kl", "entropy", "masked_entropy")]
    assert (terms["policy"].clip_ratio_low, terms["policy"].clip_ratio_high, *coefs) == (0.2, *TABLE_6[name])
    assert config.worker.actor.loss_avg_mode == "token" and config.worker.rollout.n == 5
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size) == (384, 128)
    assert config.worker.actor.optim.lr == 1e-6 and config.worker.actor.optim.weight_decay == 1e-2
    assert config.algorithm.online_filtering == ("dapo" in name)
    if "masked" in config.algorithm.views:
        view = config.algorithm.views["masked"]
        assert (view.kind, view.patch_size, view.prob, view.stage) == ("random_patch", 14, 0.6, "raw")
    found = check(config)
    assert found.reference == (coefs[0] is not None) and found.old
    views = () if coefs[1] is None else ("masked",)
    live = name == "papo_grpo_live"
    assert (found.live_views, found.stored_views) == ((views, ()) if live else ((), views))
    assert found.inert == (("masked_entropy",) if coefs[3] and not live else ())
