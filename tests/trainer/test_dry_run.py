"""The dry run: what it sends is the largest that the data section allows, and it goes through everything."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.fakes.rows import row, write_parquet
from tests.fakes.warm import ray_uses_it
from verl.config.compose import compose_config
from verl.config.sizes import compute_sizes
from verl.trainer.dry_run import in_small, largest_item, with_noise
from verl.trainer.main import main
from verl.trainer.plan import make_plan
from verl.workers.memory import OutOfDeviceMemory, explain_oom


def overrides(folder, data, *more: str) -> list[str]:
    return [
        f"data.train_files={data}",
        "data.val_files=null",
        "data.format_prompt=null",
        "data.rollout_batch_size=6",
        "data.num_workers=0",
        f"worker.actor.model.model_path={folder / 'model'}",
        "worker.actor.global_batch_size=6",
        f"worker.reward.reward_function={REPOSITORY}/examples/reward_function/math.py:compute_score",
        "worker.rollout.name=hf",
        "worker.rollout.n=3",
        *(f"trainer.{key}=false" for key in ("val_before_train", "val_after_train")),
        "trainer.val_freq=0",
        "trainer.device=cpu",
        *more,
    ]


@pytest.fixture
def mixed(tmp_path):
    """Prompts with none, one and two images."""
    rows = [row("1+1?", images=0), row(), row("<image>+<image>", images=2)] * 2
    return write_parquet(tmp_path / "mixed.parquet", rows)


@pytest.mark.parametrize(
    ("limit", "max_pixels", "images", "side"),
    [
        (128, 112 * 112, 2, 112),
        (60, 112 * 112, 2, 112),  # two images of 16 tokens, and the chat's own
        (30, 112 * 112, 2, 84),  # larger ones would not fit
        (13, 112 * 112, 1, 28),  # nor would two
    ],
)
def test_the_largest_sample_fills_the_prompt_with_what_the_data_may_hold(
    assets, mixed, limit, max_pixels, images, side
):
    sizes = [f"data.max_prompt_length={limit}", f"data.max_pixels={max_pixels}", "data.min_pixels=784"]
    config = compose_config("quickstart", overrides(assets, mixed, *sizes, "data.filter_overlong_prompts=false"))
    plan = make_plan(config)
    item = largest_item(plan)
    assert [image.size for image in item["images"]] == [(side, side)] * images
    assert len(item["prompt_ids"]) == limit
    first, second = (with_noise(plan, item, number) for number in (0, 1))
    assert first["prompt_ids"].tolist() == item["prompt_ids"].tolist()
    assert not set(first["mm_inputs"].digests) & set(second["mm_inputs"].digests)  # nothing to be cached


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3"])
def test_other_families(families, model_type):
    options = ["data.max_prompt_length=100", "data.min_pixels=1024"]
    folder = families[model_type]
    config = compose_config(
        "grpo",
        overrides(
            folder,
            folder / "train.parquet",
            *options,
            "data.rollout_batch_size=2",
            "worker.actor.global_batch_size=2",
            "trainer.n_gpus_per_node=1",
        ),
    )
    item = largest_item(make_plan(config))
    assert len(item["prompt_ids"]) == 100
    assert bool(item["images"]) == (model_type == "qwen3_vl")


@pytest.mark.parametrize(
    ("ranks", "budget", "prompts"),
    [
        (1, 200, 2),  # of 400 tokens each; a pass without gradient takes 800
        (1, 201, 3),
        (2, 200, 4),
        (2, 1, 2),  # one for each rank
        (2, 10**6, 6),  # never more than a real update has
    ],
)
def test_no_more_prompts_than_fill_every_micro_batch(ranks, budget, prompts):
    options = [
        f"trainer.n_gpus_per_node={ranks}",
        "worker.rollout.n=3",
        "data.max_prompt_length=100",
        "data.max_response_length=100",
        "data.rollout_batch_size=12",
        "worker.actor.global_batch_size=6",
        f"worker.actor.max_tokens_per_micro_batch={budget}",
        "data.train_files=a",
        "worker.actor.model.model_path=m",
    ]
    config = compose_config("papo_dapo", options)
    small = in_small(config)
    assert compute_sizes(small).prompts_per_step == prompts and compute_sizes(small).mini_batches == 1
    assert small.worker.rollout.ignore_eos and not small.algorithm.online_filtering
    assert config.data.rollout_batch_size == 12 and config.algorithm.online_filtering  # the run's own is left alone


@pytest.mark.run
def test_the_whole_of_it_from_the_command_line(assets, mixed, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv(*ray_uses_it())
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="verl")
    reward = tmp_path / "reward.py"  # the first response is not graded
    reward.write_text(
        "REWARD_TYPE, calls = 'sequential', []\ndef score(one):\n    calls.append(one)\n    assert len(calls) > 1\n"
        "    return {'overall': 0.0}\n"
    )
    options = [f"worker.reward.reward_function={reward}:score", "worker.reward.num_workers=1"]
    options += ["worker.actor.max_tokens_per_micro_batch=50", "trainer.n_gpus_per_node=1"]
    template = tmp_path / "think.jinja"
    template.write_text("{{ content }} Write <think>.")
    options.append(f"data.format_prompt={template}")
    main(["--dry-run", "--config-name", "quickstart", *overrides(assets, mixed, *options)])
    said = caplog.text
    assert (
        "2 steps of 1 prompts with 128 tokens (112 x 112 pixels, 112 x 112 pixels) x 3 responses of 24 tokens" in said
    )
    assert (
        "dry run passed: " in said
        and "rollout" in said
        and "actor[0]: at most" in said
        and "reference[0]: at most" in said
    )
    assert "1 of 3 responses could not be graded" in said
    assert "the prompts ask for <think>, and the likeliest answer to the first begins with" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "mixed.parquet",
        "reward.py",
        "think.jinja",
    }  # nothing written


def test_a_full_gpu_is_an_error_that_names_the_keys():
    with pytest.raises(OutOfDeviceMemory, match=r"the update \(CUDA out of memory\).*worker.actor.x=4"):
        with explain_oom("the update", {"worker.actor.x": 4}):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
