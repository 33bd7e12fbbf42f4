"""The whole loop as a user starts it: a real command, Ray, two ranks, two steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.fakes.readme import readme_term
from tests.fakes.runs import REWARD, TIMINGS, command, records, start

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("run") / "out"
    logger = "trainer.logger=[console,jsonl,tensorboard]"
    sizes = "worker.actor.max_tokens_per_micro_batch=300"
    done = start(assets, output, sizes, "trainer.val_freq=1", logger)
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stdout + done.stderr


def test_a_run_leaves_everything_it_promises(finished):
    output, log = finished
    expected = {"config.yaml", "metrics.jsonl", "samples.jsonl", "model", "curves.png", "summary.json", "tensorboard"}
    expected |= {"checkpoints", "machine.json", "pictures"}
    assert {p.name for p in output.iterdir()} == expected
    summary = json.loads((output / "summary.json").read_text())
    assert {"val_accuracy_before", "val_accuracy_after", "steps", "seconds", "seed"} <= set(summary)
    assert summary["steps"] == 2 and summary["seed"] == 1
    assert "4 prompts x 3 responses = 12 responses" in log and "Traceback" not in log
    assert "old log-probs, reference log-probs, log-probs of view 'masked' (no gradient)" in log


def test_samples_show_what_each_token_owes_to_the_image(finished):
    output, _ = finished
    found = records(output / "samples.jsonl")
    for sample in found:
        assert len(sample["tokens"]) == len(sample["log_prob"]) > 0
        ordinary = re.sub(r"<\|\w+\|>", "", "".join(sample["tokens"]))  # the response leaves special tokens out
        assert ordinary.startswith(sample["response"].rstrip("\ufffd")[:3])
        assert (output / sample["pictures"]["image"]).is_file()
    train = [sample for sample in found if sample["split"] == "train"]
    for sample in train:
        view = sample["views"]["masked"]
        apart = [m - own for m, own in zip(view["log_prob"], sample["log_prob"], strict=True)]
        assert view["kl"] == pytest.approx([math.exp(d) - d - 1 for d in apart], abs=2e-3)
        assert len(set(sample["advantage"])) == 1 and (output / sample["pictures"]["masked"]).is_file()
    assert len(train) == 2 * 4 and len({sample["uid"] for sample in found if sample["split"] == "val"}) == 4


def test_tensorboard_has_the_metrics_and_the_pictures_of_each_validation(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = finished
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    losses = [record["actor/pg_loss"] for record in records(output / "metrics.jsonl")[1:]]
    assert [e.value for e in events.Scalars("actor/pg_loss")] == pytest.approx(losses)
    names = {f"val_generations/{index}/{name}" for index in range(4) for name in ("image", "masked")}
    assert set(events.Tags()["images"]) == names
    assert [e.step for e in events.Images("val_generations/3/masked")] == [0, 1, 2]


def test_metrics_of_each_step(finished):
    output, _ = finished
    before, first, second = records(output / "metrics.jsonl")
    assert (before["step"], first["step"], second["step"]) == (0, 1, 2)
    names = """train/accuracy train/reward actor/pg_loss actor/perception_kl actor/entropy actor/masked_entropy
        actor/ref_kl actor/grad_norm actor/clip_frac_high actor/clip_frac_low rollout/log_prob_diff_mean
        rollout/log_prob_diff_max rollout/mismatch_kl timing_s/rollout timing_s/update timing_s/weight_sync
        perf/tokens_per_second"""
    for record in (first, second):
        assert set(names.split()) <= set(record)
        # The second step's responses come from synced weights: engine and trainer still agree.
        assert record["rollout/log_prob_diff_max"] < 1e-4 and record["actor/first_log_ratio_max"] < 1e-4
        assert record["actor/skipped_frac"] == 0
    assert "val/accuracy" in before and "val/accuracy" in second
    assert first["actor/ref_kl"] < second["actor/ref_kl"]
    assert len(records(output / "samples.jsonl")) == 5 * 4
    assert {"step", "split", "uid", "prompt", "response", "answer", "score"} <= set(
        records(output / "samples.jsonl")[0]
    )


def test_the_saved_model_is_an_ordinary_folder_that_has_learnt(finished, assets):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    output, _ = finished
    processor = AutoProcessor.from_pretrained(output / "model")
    model = AutoModelForImageTextToText.from_pretrained(output / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Add the digits."}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 28), "white")], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    start_weights = AutoModelForImageTextToText.from_pretrained(assets / "model").state_dict()
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, start_weights[name])]
    assert any("visual" in name for name in moved) and any("lm_head" in name for name in moved)


def test_the_same_seed_gives_the_same_numbers_and_an_earlier_run_is_kept(finished, assets):
    """The first run had warm processes (tests/fakes/warm.py) and the tests' Ray; this one has all of its own."""
    output, _ = finished
    first = records(output / "metrics.jsonl")
    sizes = "worker.actor.max_tokens_per_micro_batch=300"
    done = start(assets, output, sizes, "trainer.val_freq=1", "trainer.resume=never", cold=True)
    assert done.returncode == 0, done.stderr[-4000:]
    again = records(output / "metrics.jsonl")

    def values(record):
        return {name: value for name, value in record.items() if not name.startswith(TIMINGS)}

    assert [values(r) for r in again] == [values(r) for r in first]
    assert (output.parent / "out.previous-1" / "summary.json").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.train_files=outputs/nowhere.parquet", "outputs/nowhere.parquet"),
        ("worker.actor.model.model_path=outputs/nowhere/model", "outputs/nowhere/model"),
        ("worker.reward.reward_function=examples/nowhere.py:score", "examples/nowhere.py"),
        ("data.format_prompt=examples/nowhere.jinja", "examples/nowhere.jinja"),
        ("data.rollout_batch_size=5", "worker.actor.global_batch_size"),
        ("worker.actor.model.lora={rank: 1, target_modules: [c_attn]}", "'c_attn' matches no linear layer"),
    ],
)
def test_mistyped_paths_stop_the_command_at_once_with_one_clear_line(assets, tmp_path, override, named):
    done = start(assets, tmp_path / "out", override)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and named in last
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_live_view_no_reference_one_rank_and_a_term_from_a_users_file(assets, tmp_path):
    """The other way through the passes, with the loss term of configs/README.md."""
    (tmp_path / "my_terms.py").write_text(readme_term())
    overrides = ["algorithm.views.masked.grad=true", "algorithm.terms.masked_entropy.coef=0.01"]
    overrides += ["~term@algorithm.terms.ref_kl", "trainer.n_gpus_per_node=1"]
    overrides += ["+term@algorithm.terms.confident=confidence", "algorithm.terms.confident.coef=0.1"]
    off = [
        "trainer.val_before_train=false",
        "trainer.val_after_train=false",
        "trainer.val_freq=0",
        "data.val_files=null",
    ]
    environment = {"VERL_PLUGINS": str(tmp_path / "my_terms.py")}
    done = start(assets, tmp_path / "out", *overrides, *off, "trainer.save_model=false", env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = records(tmp_path / "out" / "metrics.jsonl")
    assert 0 < first["actor/confident"] < 1 and first["actor/grad_per_token/confident"] > 0
    assert "actor/ref_kl" not in first and "timing_s/ref_log_probs" not in first
    assert first["actor/perception_kl"] > 0 and first["actor/grad_per_token/masked_entropy"] > 0
    assert "passes before the updates: old log-probs\n" in done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) == {"steps", "seconds", "seed"} and not (tmp_path / "out" / "model").exists()


def test_lora_trains_beside_a_reference_that_is_the_actor_without_its_adapter(assets, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    lora = ["worker.actor.model.lora.rank=4", "worker.actor.optim.lr=0.01", "worker.actor.optim.lr_warmup_steps=0"]
    one_update = "worker.actor.global_batch_size=4"  # so that in the first step nothing has moved yet
    done = start(assets, tmp_path / "out", *lora, one_update, "trainer.val_freq=0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "LoRA of rank 4 on 21 linear layers of the language model" in done.stderr
    assert "reference log-probs (the actor without its adapter)" in done.stderr
    _, first, second, *_ = records(tmp_path / "out" / "metrics.jsonl")
    assert first["timing_s/ref_log_probs"] > 0 and first["actor/ref_kl"] < 1e-9 and second["actor/ref_kl"] > 1e-4
    for record in (first, second):  # the engine has merged weights, and the trainer adapters on top of them
        assert record["rollout/log_prob_diff_max"] < 1e-4
        assert record["actor/skipped_frac"] == 0 and record["actor/grad_per_token/perception_kl"] > 0
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    plain = AutoModelForImageTextToText.from_pretrained(assets / "model")
    untouched = {name: weight.clone() for name, weight in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, tmp_path / "out" / "model" / "adapter").merge_and_unload().state_dict()
    for name, weight in saved.state_dict().items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
        language = name.endswith("_proj.weight") and "visual" not in name
        assert torch.equal(weight, untouched[name]) != language, name


def test_papo_d_filters_groups_and_shapes_long_responses(assets, tmp_path):
    """An untrained model is never right, so a coin decides here which response is; the masked view is live, so that no
    pass is needed for it."""
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        "algorithm.views.masked.grad=true",
        f"worker.reward.reward_function={tmp_path / 'reward.py'}:score",
        "algorithm.online_filtering=true",
        "algorithm.overlong_buffer=8",
        "data.mini_rollout_batch_size=3",
        "~term@algorithm.terms.ref_kl",
        "algorithm.adv_estimator=dr_grpo",
        "worker.actor.loss_avg_mode=seq_sum",
        "worker.actor.global_batch_size=4",
    ]
    done = start(assets, tmp_path / "out", *overrides, "trainer.val_freq=0", "trainer.save_model=false")
    assert done.returncode == 0, done.stderr[-4000:]
    _, first, second = records(tmp_path / "out" / "metrics.jsonl")
    for record in (first, second):
        assert record["train/groups_without_signal"] == 0
        assert record["actor/skipped_frac"] == 0 and record["train/overlong_penalty"] < 0
        # One update per step: a pass for the old log-probs only where responses have waited, which keep the engine's.
        # How far the engine is off is measured on the others.
        waited = record["rollout/weight_version"] != record["step"] - 1
        assert ("timing_s/log_probs" in record) == waited
        assert record.get("rollout/log_prob_diff_max", 0.0) < 1e-4
    # Three prompts at a time cannot fill the first step of four groups at once.
    assert first["rollout/weight_version"] == 0 and first["train/filter_tries"] >= 2


def test_the_watchdog_can_end_a_run_and_leaves_what_a_run_leaves(assets, tmp_path):
    """A band of no width, so that the first step behind it is an event."""
    strict = "window: 1, warmup_steps: 0, patience: 1, relative: 0, tolerance: 0, action: stop"
    overrides = [f"algorithm.watchdog={{{strict}}}", "trainer.max_steps=6", "algorithm.terms.perception_kl.coef=5"]
    overrides += ["worker.actor.optim.lr=0.01", "worker.actor.optim.lr_warmup_steps=0", "trainer.val_freq=0"]
    done = start(assets, tmp_path / "out", *overrides, "trainer.n_gpus_per_node=1")
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    events = records(tmp_path / "out" / "events.jsonl")
    assert summary["steps"] < 6 and "val_accuracy_after" in summary
    assert {event["step"] for event in events} == {summary["steps"]} and events[0]["action"] == "stop"
    assert f"the watchdog has stopped the run after step {summary['steps']}" in done.stderr
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_a_reward_that_always_fails_ends_the_run_with_a_sample_and_its_own_traceback(assets, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def score(inputs):\n    return inputs['response']\n")
    done = start(assets, tmp_path / "out", f"worker.reward.reward_function={reward}:score", "trainer.n_gpus_per_node=1")
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("error: ") :]
    assert "of 24 responses of this step or validation could not be graded (raised" in message
    assert "worker.reward.max_failure_frac=0.1" in message
    assert "TypeError: list indices must be integers" in message and "ground_truth: " in message
    assert "ray" not in message and message.count("Traceback") == 1
    (first, *_) = records(tmp_path / "out" / "reward_failures.jsonl")
    assert first["step"] == 0 and first["reason"] == "raised" and f"response: {first['response']!r}" in message


def test_validation_alone_starts_no_training_worker_and_harms_no_run(assets, finished):
    """Its files are in a folder of its own; the run whose folder the same settings name stays as it was."""
    run = finished[0]
    folders = {path.name for path in run.parent.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    overrides = ["trainer.val_only=true", "data.train_files=null", "worker.rollout.data_parallel_size=2"]
    done = start(assets, run, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert {path.name for path in run.parent.iterdir()} == folders | {"out-validation"}
    output = run.parent / "out-validation"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 0 and {"val_accuracy", "val_reward"} <= set(summary)
    assert "validation accuracy: " in done.stderr and "policy with" not in done.stderr
    (record,) = records(output / "metrics.jsonl")
    assert record["step"] == 0 and record["val/accuracy"] == summary["val_accuracy"]
    assert not (output / "model").exists()


def test_a_preset_that_does_not_exist_and_the_whole_config():
    done = subprocess.run(command("--print-config"), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "perception_kl:" in done.stdout
    wrong = [sys.executable, "-m", "verl.trainer.main", "--config-name", "quikstart"]
    done = subprocess.run(wrong, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "there is no preset 'quikstart'" in done.stderr and "quickstart" in done.stderr
