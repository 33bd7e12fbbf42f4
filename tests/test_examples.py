"""Every launch script runs the paper's setting, every template renders, every file that examples name exists."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from papo.tools.doctor.case import GPU, Case
from papo.tools.doctor.fit import CLOSE
from papo.tools.doctor.memory import estimate
from papo.tools.doctor.shape import shape_of
from tests.conftest import REPOSITORY
from tests.fakes.models import internvl3_5, qwen3_5
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.data.rows import load_template
from verl.trainer.main import parse
from verl.trainer.plan import check
from verl.workers.reward.functions import load_functions

pytestmark = pytest.mark.usefixtures("in_repository")

SCRIPTS = sorted(str(p.relative_to(REPOSITORY / "examples")) for p in (REPOSITORY / "examples").glob("papo_*/*.sh"))

# Table 6 and appendix F of the paper: GPUs, clip high, beta, gamma, eta1, eta2 (None: the term is absent).
SETTINGS = {
    "papo_grpo/qwen2_5_vl_3b_grpo.sh": (2, 0.3, 0.01, None, 0.0, None),
    "papo_grpo/qwen2_5_vl_7b_grpo.sh": (4, 0.3, 0.01, None, 0.0, None),
    "papo_grpo/qwen2_5_vl_3b_grpo_papo.sh": (2, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/qwen2_5_vl_7b_grpo_papo.sh": (4, 0.3, 0.01, 0.02, 0.05, 0.05),
    "papo_grpo/qwen2_5_vl_7b_grpo_papo_lora.sh": (1, 0.3, 0.01, 0.02, 0.05, 0.05),
    "papo_grpo/qwen2_5_vl_3b_grpo_papo_no_kl_ref.sh": (2, 0.3, None, 0.01, 0.03, 0.03),
    "papo_grpo/qwen2_5_vl_7b_grpo_papo_no_kl_ref.sh": (4, 0.3, None, 0.01, 0.03, 0.03),
    "papo_grpo/qwen3_vl_2b_thinking_grpo.sh": (4, 0.3, 0.01, None, 0.0, None),
    "papo_grpo/qwen3_vl_2b_thinking_grpo_papo.sh": (4, 0.3, 0.01, 0.01, 0.0, 0.0),
    "papo_grpo/qwen3_vl_4b_thinking_grpo.sh": (4, 0.3, 0.01, None, 0.0, None),
    "papo_grpo/qwen3_vl_4b_thinking_grpo_papo.sh": (4, 0.3, 0.01, 0.01, 0.0, 0.0),
    "papo_grpo/qwen3_5_2b_grpo_papo.sh": (1, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/qwen3_5_4b_grpo_papo.sh": (2, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/qwen3_5_9b_grpo_papo.sh": (8, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/internvl3_5_2b_grpo_papo.sh": (1, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/internvl3_5_4b_grpo_papo.sh": (2, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_grpo/internvl3_5_8b_grpo_papo.sh": (8, 0.3, 0.01, 0.02, 0.0, 0.0),
    "papo_dapo/qwen2_5_vl_3b_dapo.sh": (2, 0.28, None, None, 0.0, None),
    "papo_dapo/qwen2_5_vl_7b_dapo.sh": (4, 0.28, None, None, 0.0, None),
    "papo_dapo/qwen2_5_vl_3b_dapo_papo.sh": (2, 0.28, None, 0.01, 0.03, 0.03),
    "papo_dapo/qwen2_5_vl_7b_dapo_papo.sh": (4, 0.28, None, 0.01, 0.03, 0.03),
}
MODELS = {
    "qwen2_5_vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl_2b_thinking": "Qwen/Qwen3-VL-2B-Thinking",
    "qwen3_vl_4b_thinking": "Qwen/Qwen3-VL-4B-Thinking",
    **{f"qwen3_5_{size.lower()}": f"Qwen/Qwen3.5-{size}" for size in ("2B", "4B", "9B")},
    **{f"internvl3_5_{size.lower()}": f"OpenGVLab/InternVL3_5-{size}-HF" for size in ("2B", "4B", "8B")},
}


@pytest.fixture
def launch(tmp_path):
    """Runs a script from elsewhere, with a `python` that says what it is asked for; gives the config of that."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    stub.chmod(0o755)

    def launch(script: str, *overrides: str, **environment: str) -> Config:
        variables = {"PATH": f"{stub.parent}:{os.environ['PATH']}", **environment}
        command = ["bash", str(REPOSITORY / "examples" / script), *overrides]
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
        folder, *words = done.stdout.splitlines()
        assert folder == str(REPOSITORY) and words[:2] == ["-m", "verl.trainer.main"]
        options = parse(words[2:])
        return compose_config(options.config_name, options.overrides, options.config_dir)

    return launch


def test_the_table_names_every_script():
    assert set(SETTINGS) == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_the_papers_setting(script, launch):
    config = launch(script)
    needs = check(config)
    terms, rollout, data = config.algorithm.terms, config.worker.rollout, config.data
    gpus, clip_high, *coefs = SETTINGS[script]
    names = ("ref_kl", "perception_kl", "entropy", "masked_entropy")
    assert [terms[name].coef if name in terms else None for name in names] == coefs
    assert (terms["policy"].clip_ratio_low, terms["policy"].clip_ratio_high) == (0.2, clip_high)
    assert terms["policy"].clip_ratio_dual == 3.0 and config.worker.actor.loss_avg_mode == "token"
    assert config.algorithm.adv_estimator == "grpo"

    # Section 1.6 of the paper's setup: 384 prompts x 5 responses, 3 updates a step, 2 epochs.
    sizes = compute_sizes(config)
    assert (sizes.responses_per_step, sizes.responses_per_update, sizes.updates_per_step) == (1920, 640, 3)
    assert (sizes.ranks, config.trainer.total_epochs, config.trainer.val_freq) == (gpus, 2, 5)
    optim, lora = config.worker.actor.optim, config.worker.actor.model.lora
    assert (lora.rank > 0) == script.endswith("_lora.sh") == config.worker.actor_is_reference
    assert (optim.lr, optim.weight_decay, optim.lr_warmup_steps, config.worker.actor.max_grad_norm) == (
        1e-5 if lora.rank else 1e-6,
        0.01,
        0,
        1,
    )
    assert optim.lr_scheduler_type == "constant" and not config.worker.actor.model.freeze_vision_tower
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.val_override_config.n) == (1.0, 0.99, -1, 8)
    assert (data.min_pixels, data.max_pixels, data.max_prompt_length) == (200704, 1003520, 4096)
    assert data.filter_overlong_prompts and data.format_prompt.endswith("math_perception.jinja")
    assert (data.train_files, data.val_files) == ("PAPOGalaxy/PAPO_ViRL39K_train", "PAPOGalaxy/PAPO_MMK12_test")

    name = os.path.basename(script).removesuffix(".sh")
    model = next(model for model in MODELS if name.startswith(model))
    assert config.worker.actor.model.model_path == MODELS[model] and config.trainer.experiment_name == name
    assert needs.reference == (coefs[0] is not None) and needs.inert == (("masked_entropy",) if coefs[3] else ())
    thinking = "thinking" in name or name.startswith("qwen3_5")
    assert data.max_response_length == (8192 if thinking else 2048)
    assert config.worker.reward.reward_function.split("/")[-1].startswith("qwen3_vl_think" if thinking else "math")
    load_functions(config.worker.reward)  # the function is there

    dapo = "_dapo" in name
    assert (config.algorithm.online_filtering, data.mini_rollout_batch_size) == (dapo, 128 if dapo else None)
    assert (config.algorithm.filter_key, config.algorithm.filter_low, config.algorithm.filter_high) == (
        "accuracy",
        0.01,
        0.99,
    )
    assert config.trainer.max_try_make_batch == 20
    # A baseline is a baseline: no masked view, whose pass would cost time, and no term over it.
    assert bool(config.algorithm.views) == ("papo" in name) == (coefs[1] is not None)
    if "papo" in name:
        view = config.algorithm.views["masked"]
        assert (view.kind, view.prob, view.stage, view.per) == ("random_patch", 0.6, "raw", "prompt")
        assert view.patch_size == (16 if thinking else 14) and not view.grad


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "3_5_" in script])
def test_scripts_of_new_families_fit_their_gpus_by_the_doctors_arithmetic(script, launch):
    config = launch(script)
    family, _, size = os.path.basename(script).split("_grpo")[0].rpartition("_")
    shape = shape_of({"qwen3_5": qwen3_5, "internvl3_5": internvl3_5}[family](size))
    assert 0.9 < shape.parameters / 1e9 / int(size[0]) < 1.2  # the model that the script names
    case = Case([GPU("80 GiB", 80 * 2**30, 80 * 2**30)] * config.trainer.n_gpus_per_node, imagined=True, config=config)
    found = estimate(case, config, {"actor": shape, "reference": shape, "critic": shape})
    assert max(phase.bytes for phase in found.phases) < CLOSE * found.capacity
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert found.cache // found.token > 8 * longest


def test_overrides_and_environment_reach_the_run(launch):
    config = launch(
        "papo_grpo/qwen2_5_vl_3b_grpo_papo.sh",
        "trainer.n_gpus_per_node=8",
        "~term@algorithm.terms.ref_kl",
        MODEL_PATH="/models/a b@1",
        TRAIN_FILES="one.parquet,two=2.parquet",
        VAL_FILES="hiyouga/geometry3k@test",
    )
    assert config.worker.actor.model.model_path == "/models/a b@1" and config.trainer.n_gpus_per_node == 8
    assert (config.data.train_files, config.data.val_files) == ("one.parquet,two=2.parquet", "hiyouga/geometry3k@test")
    assert "ref_kl" not in config.algorithm.terms


def test_a_script_runs_the_program_itself():
    """Once without the stub: the program that the script names prints the config that it would train with."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", "examples/papo_dapo/qwen2_5_vl_7b_dapo_papo.sh", "trainer.max_steps=3", "--print-config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    printed = yaml.safe_load(done.stdout)
    assert printed["trainer"]["max_steps"] == 3 and printed["algorithm"]["terms"]["perception_kl"]["coef"] == 0.01


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_thin_and_executable(script):
    path = REPOSITORY / "examples" / script
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines and lines[-1].strip() == '"$@"'
    assert len(lines) <= 25 and max(map(len, lines)) <= 120 and os.access(path, os.X_OK)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples/format_prompt").glob("*.jinja")), ids=lambda p: p.stem)
def test_every_template_shows_the_problem_once_and_says_where_the_answer_goes(path):
    text = load_template(str(path)).render(content="  <image>How many {cats}?\n")
    assert text.count("<image>How many {cats}?") == 1 and "  <image>" not in text
    assert any(place in text for place in ("\\boxed{}", "<answer> </answer>", '"Answer: "'))


def test_the_jobs_environment_is_one_that_ray_takes():
    found = yaml.safe_load((REPOSITORY / "examples/runtime_env.yaml").read_text())
    environment = RuntimeEnv(**found)
    assert environment.env_vars()["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    assert {"/.git/", "/.venv/", "/outputs"} <= set(found["excludes"])
