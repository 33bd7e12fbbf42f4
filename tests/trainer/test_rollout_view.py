"""Responses drawn under a view (algorithm.rollout_view): which images the engine gets, in what strength and order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from papo.corruption.fill import BlankConfig, GaussianNoiseConfig
from papo.corruption.patches import PatchConfig
from tests.fakes.rows import row, write_parquet
from verl.algorithms.requirements import requirements_of
from verl.config.algorithm import RolloutViewConfig
from verl.config.compose import compose_config
from verl.config.option import check_options
from verl.config.sizes import Sizes
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.trainer.collect import Collector, side_by_side_rows
from verl.trainer.state import TrainState
from verl.workers.rollout.base import pad_responses

N, STEPS = 5, 11


class Engine:
    """Answers with the number of the prompt and, as the second token, which of its images it saw."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def generate(self, prompts, sampling, ahead=False):
        self.images, self.sampling = prompts["mm_inputs"], sampling
        return [(int(uid.rpartition(":")[2]), request.n) for uid, request in zip(prompts["uid"], sampling, strict=True)]

    def result(self, asked):
        tokens = [[10 + number, 40 + place // 3] for place, (number, n) in enumerate(asked) for _ in range(n)]
        out = pad_responses(tokens, [[-1.0] * 2 for _ in tokens], self.pad)
        return out.with_columns({"weight_version": torch.zeros(len(tokens), dtype=torch.int64)})

    def sleep(self):
        pass


@pytest.fixture
def collector(assets, tmp_path, in_repository):
    path = write_parquet(tmp_path / "a.parquet", [row(), row("1+1?", images=0), row("<image>+<image>", images=2)])
    config = compose_config(
        "noisy_rollout",
        [
            *(f"data.train_files={path}", "data.val_files=null", "data.format_prompt=null", f"worker.rollout.n={N}"),
            *(
                f"worker.actor.model.model_path={assets / 'model'}",
                f"trainer.max_steps={STEPS}",
                "trainer.samples_per_step=0",
            ),
        ],
    )
    vision = VisionProcessor(str(assets / "model"), 784, 12544)
    data = PromptDataset(path, "k", config.data, vision)
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(3)])
    tally = SimpleNamespace()
    reward = SimpleNamespace(start=list, result=list, begin=lambda expected: tally)
    workers = SimpleNamespace(rollout=Engine(vision.special.pad), reward=reward)
    plan = SimpleNamespace(
        config=config, sizes=Sizes(1, 3, N, 3, 1, 8), vision=vision, total_steps=STEPS,
        requirements=requirements_of(config.algorithm, 1),
    )  # fmt: skip
    return Collector(plan, workers, TrainState(iter([(0, prompts)] * 3), None, None))


def test_half_of_a_prompts_responses_are_drawn_from_a_noised_image(collector):
    rows = collector.finish(collector.begin())
    engine = collector.workers.rollout
    assert [request.n for request in engine.sampling] == [3, 3, 3, 2, 2, 2], "two of five, rounded"
    seeds = [request.seed for request in engine.sampling]
    assert len(set(seeds)) == 6, "no two draws are the same"
    assert rows.batch["responses"][:, 0].tolist() == [10] * N + [11] * N + [12] * N
    assert rows.batch["responses"][:, 1].tolist() == [40, 40, 40, 41, 41] * 3
    assert rows.batch["drawn_under_view"].tolist() == [False, False, False, True, True] * 3
    clean, noised = engine.images[:3], engine.images[3:]
    assert [len(one) for one in noised] == [1, 0, 2], "as many pictures, none for text"
    for one, other in zip(clean, noised, strict=True):
        assert not set(one.digests) & set(other.digests)
    trained = rows.batch["mm_inputs"]
    assert all(trained[row].digests == clean[row // N].digests for row in range(3 * N)), "trained on the clean one"
    assert collector.plan.requirements.old_pass, "given the clean image, only the trainer has the old log-probs"


def test_the_noise_fades_over_the_run(collector):
    def apart(step: int) -> float:
        collector.state.step = step - 1
        collector.finish(collector.begin())
        clean, noised = (collector.workers.rollout.images[i].tensors()["pixel_values"] for i in (0, 3))
        return (clean - noised).abs().mean().item()

    first, middle, last = apart(1), apart(6), apart(STEPS)
    assert first > 1.5 * middle > 0 and last == pytest.approx(0, abs=1e-6)


def test_rows_of_a_prompt_are_side_by_side():
    order = side_by_side_rows(prompts=2, responses=3, under=1)
    assert order.tolist() == [0, 1, 4, 2, 3, 5]
    assert np.array_equal(np.sort(order.numpy()), np.arange(6))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algorithm.rollout_view.view=blurred"], "algorithm.views has noised"),
        (["algorithm.terms.policy.tis=token"], "those of another image"),
        (["algorithm.old_log_probs=rollout"], "those of another image"),
        (["algorithm.views.noised.per=response"], "share one picture"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, says, in_repository):
    with pytest.raises(ValueError, match=says):
        check_options(compose_config("noisy_rollout", ["+task=digits", *overrides]))


@pytest.mark.parametrize(("share", "responses", "drawn"), [(0.5, 5, 2), (0.9, 3, 2), (0.1, 4, 1), (0.5, 2, 1)])
def test_some_responses_are_drawn_under_the_view_and_not_all(share, responses, drawn):
    assert RolloutViewConfig(view="noised", share=share).drawn(responses) == drawn
    assert RolloutViewConfig(share=share).drawn(responses) == 0


def test_only_a_view_with_a_strength_can_fade():
    assert GaussianNoiseConfig(std=0.4).scaled(0.5).std == 0.2 and PatchConfig(prob=0.6).scaled(0.5).prob == 0.3
    with pytest.raises(ValueError, match="kind blank has no strength"):
        BlankConfig().scaled(0.5)
