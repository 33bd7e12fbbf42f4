"""Every preset trains on rows with and without images, through the trainer's own passes and updates.

One start of two ranks serves all presets: the actor is built anew from each preset's config.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.fakes.rows import row, write_parquet
from tests.fakes.runs import PARTIAL
from tests.fakes.steps import two_steps
from verl.algorithms.requirements import requirements_of
from verl.config.compose import compose_config, presets
from verl.config.config import Config
from verl.trainer.plan import Plan, check, make_plan
from verl.trainer.workers import Workers
from verl.workers.model_worker import ActorWorker

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("in_repository")]

# In the passes of the first step rank 1 has no image at all, in those of the second each rank has one micro-batch
# without; the second update of the first step has no image on any rank, those of the second step one on rank 0 alone.
IMAGES = [1, 2, 0, 0, 1, 0, 1, 0]
LIVE = {"papo_grpo_live": {"masked"}, "papo_banded": {"masked"}, "dvrp": {"masked", "noised"}}
STORED = {"papo_grpo", "papo_grpo_3b", "papo_grpo_no_kl_ref", "papo_dapo", "papo_upstream", "papo_noisy_rollout"}
STORED |= {"papo_banded", "vppo", "pgpo", "tor", "vepo", "quickstart"}  # papo_banded's reward reads the stored view


def compose(preset: str, assets: Path, folder: Path) -> Config:
    """The preset on eight mixed rows, two steps of four prompts, two updates each, a micro-batch per response."""
    task = [] if preset == "quickstart" else ["+task=digits"]
    return compose_config(
        preset,
        [
            *task,
            f"data.train_files={folder / 'mixed.parquet'}",
            "data.val_files=null",
            "data.shuffle=false",
            "data.rollout_batch_size=4",
            "data.max_response_length=8",
            f"worker.actor.model.model_path={assets / 'model'}",
            "worker.actor.global_batch_size=2",
            "worker.actor.max_tokens_per_micro_batch=1",
            "worker.actor.optim.lr_warmup_steps=0",
            "worker.rollout.n=3",
            f"worker.reward.reward_function={folder / 'reward.py'}:score",
            "worker.reward.reward_function_kwargs={}",
            f"trainer.output_dir={folder / 'out'}",
            *("trainer.n_gpus_per_node=2", "trainer.max_steps=2", "trainer.device=cpu"),
            *("trainer.val_before_train=false", "trainer.val_after_train=false", "trainer.val_freq=0"),
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    rows = [row("<image>" * count + f"Add the digits, {i}.", images=count) for i, count in enumerate(IMAGES)]
    write_parquet(folder / "mixed.parquet", rows)
    (folder / "reward.py").write_text(PARTIAL)
    return folder


@pytest.fixture(scope="module")
def built(ray_cluster, assets, folder) -> tuple[Plan, Workers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        plan = make_plan(compose("papo_grpo", assets, folder))
    workers = Workers.build(plan)
    yield plan, workers
    workers.rollout.stop()


def become(worker: ActorWorker, config: Config) -> None:
    worker.config = config
    worker.build(total_updates=4)


@pytest.mark.parametrize("preset", presets())
def test_two_steps_on_rows_with_and_without_images(built, assets, folder, preset):
    import ray

    plan, workers = built
    config = compose(preset, assets, folder)
    check(config)
    ray.get([worker.__ray_call__.remote(become, config) for worker in workers.actor.workers])
    requirements = requirements_of(config.algorithm, 1)
    assert (set(requirements.stored_views), set(requirements.live_views)) == (
        {"masked"} if preset in STORED else set(),
        LIVE.get(preset, set()),
    )
    _, results = two_steps(plan, workers, config, ((0, prompts) for prompts in plan.train_loader))
    for metrics in results:
        assert all(map(math.isfinite, metrics.values()))
        assert metrics["actor/grad_norm"] > 0 and metrics["actor/skipped_frac"] == 0
        assert metrics.get("actor/perception_kl", 1.0) > 0
