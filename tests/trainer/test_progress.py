"""What the driver carries over a resume, part by part and without workers."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from verl.algorithms.losses.compose import build_terms
from verl.algorithms.rewards import RewardKL
from verl.checkpoint.files import load_plain, save_plain
from verl.checkpoint.folder import CheckpointFolder
from verl.config.algorithm import KLController, RewardKLConfig, WatchdogAction, WatchdogConfig
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.data.loader import PromptStream, train_loader
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.tracking.run_info import settings
from verl.trainer.checkpoints import changes, find_resume_point
from verl.trainer.run_dir import RunDir
from verl.trainer.state import TrainState, rows_from_plain, rows_to_plain
from verl.trainer.watchdog import Watchdog
from verl.utils.rng import rng_state, set_rng_state
from verl.workers.reward.base import Failure, Outcome


class Seven(Dataset):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, item: int) -> int:
        return item

    def shares(self) -> list[tuple[float, list[int]]]:
        return [(1.0, list(range(7)))]


def stream(batch_size: int = 2, num_workers: int = 0) -> PromptStream:
    return PromptStream(train_loader(Seven(), batch_size, True, 5, num_workers, list))


@pytest.mark.parametrize("drawn", range(8))  # three batches an epoch: within one, at its end, in the next
def test_prompts_go_on_in_the_same_order_from_any_place(drawn):
    straight = list(itertools.islice(stream(), 10))
    first = stream()
    begun = list(itertools.islice(first, drawn))
    for _ in range(2):  # and again, where nothing was drawn between two resumes
        state, first = first.state_dict(), stream()
        first.load_state_dict(state)
    assert begun + list(itertools.islice(first, 10 - drawn)) == straight
    assert [epoch for epoch, _ in straight] == [0] * 3 + [1] * 3 + [2] * 3 + [3]


def test_the_place_does_not_depend_on_batches_or_workers():
    straight = [item for _, batch in itertools.islice(stream(1), 7) for item in batch]
    first = stream(2)
    next(first)
    for other in (stream(1, num_workers=1), stream(3)):
        other.load_state_dict(first.state_dict())
        epoch, batch = next(other)
        assert epoch == 0 and batch == straight[2 : 2 + len(batch)]


def test_random_numbers_go_on(tmp_path):
    def draw() -> tuple:
        import random

        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    np.random.rand(3)
    save_plain(str(tmp_path / "rng.pt"), rng_state())
    expected = draw()
    assert draw() != expected
    set_rng_state(load_plain(str(tmp_path / "rng.pt")))
    assert draw() == expected


def test_rows_that_wait_come_back_with_all_they_hold(tmp_path):
    image = Images(({"pixel_values": torch.rand(4, 6)},), ("a",))
    outcomes = [Outcome({"overall": 0.5}, None, 0.1), Outcome(None, Failure("timeout", "after 2 s"), 2.0)]
    rows = DataProto.from_dict(
        {"responses": torch.arange(3000).view(1000, 3)},
        {"uid": [f"f:{i}" for i in range(1000)], "mm_inputs": [image] * 1000, "outcome": outcomes * 500},
    ).rows(slice(998, None))
    save_plain(str(tmp_path / "rows.pt"), rows_to_plain(rows))
    found = rows_from_plain(load_plain(str(tmp_path / "rows.pt")))
    assert torch.equal(found["responses"], rows["responses"])
    assert list(found["uid"]) == ["f:998", "f:999"] and list(found["outcome"]) == outcomes
    assert torch.equal(found["mm_inputs"][0].tensors()["pixel_values"], image.tensors()["pixel_values"])
    assert found["mm_inputs"][0].digests == ("a",)
    assert found["mm_inputs"][0] is found["mm_inputs"][1]  # one image for the responses to one prompt
    assert (tmp_path / "rows.pt").stat().st_size < 6000  # the two rows, not the thousand they were cut from


def test_what_is_neither_tensor_nor_plain_is_refused_when_saved(tmp_path):
    with pytest.raises(TypeError, match=r"rows.pt\['score'\]\[0\] is of type float64"):
        save_plain(str(tmp_path / "rows.pt"), {"score": [np.float64(1)]})


def watchdog(window: int = 6) -> Watchdog:
    config = WatchdogConfig(window=window, warmup_steps=0, patience=2, action=WatchdogAction.reduce)
    return Watchdog(config, build_terms({}))


def test_the_watchdog_goes_on(tmp_path):
    values = [0.1, 0.11, 0.1, 0.12, 0.1, 0.11, 0.9, 0.9, 0.1, 0.95, 0.99]
    metrics = [{"actor/clip_frac_high": value, "rollout/response_length_mean": 20.0} for value in values]
    straight = watchdog()
    verdicts = [straight.observe(step, m) for step, m in enumerate(metrics, 1)]
    assert sum(len(v.events) for v in verdicts) == 2
    for cut in range(1, len(metrics)):
        first, second = watchdog(), watchdog()
        found = [first.observe(step, m) for step, m in enumerate(metrics[:cut], 1)]
        save_plain(str(tmp_path / "w.pt"), first.state_dict())
        second.load_state_dict(load_plain(str(tmp_path / "w.pt")))
        assert found + [second.observe(step, m) for step, m in enumerate(metrics[cut:], cut + 1)] == verdicts


def test_rows_that_an_earlier_version_saved_come_back():
    """Images were dicts of tensors then, those of a view without names."""
    grid = torch.tensor([[1, 2, 2], [1, 2, 4]])
    images = {"pixel_values": torch.rand(12, 6), "image_grid_thw": grid}
    objects = {"mm_inputs": [{**images, "image_ids": ("a", "b")}, {}], "masked_mm_inputs": [images, {}]}
    found = rows_from_plain({"tensors": {"responses": torch.ones(2, 3)}, "objects": objects, "meta": {}})
    own, masked = found["mm_inputs"][0], found["masked_mm_inputs"][0]
    assert own.digests == ("a", "b") and len(set(masked.digests)) == 2 and len(found["mm_inputs"][1]) == 0
    for name, tensor in images.items():
        assert torch.equal(own.tensors()[name], tensor) and torch.equal(masked.tensors()[name], tensor)


def state(controller: KLController) -> tuple[TrainState, Config]:
    config = compose_config("quickstart", ["data.train_files=x", "worker.actor.model.model_path=x"])
    config.algorithm.reward_kl = RewardKLConfig(coef=0.5, controller=controller)
    return TrainState(stream(), watchdog(), RewardKL(config.algorithm.reward_kl)), config


@pytest.mark.usefixtures("in_repository")
def test_the_driver_goes_on_and_says_what_it_drops(caplog):
    first, _ = state(KLController.adaptive)
    first.step, first.validations, first.reward_kl.coef = 2, {"val_accuracy_before": 0.5}, 0.7
    next(first.prompts)
    first.waiting = DataProto.from_dict({"responses": torch.ones(2, 3)})
    saved = first.state_dict()

    second, config = state(KLController.adaptive)
    second.load_state_dict(saved, config, set())
    assert second.step == 2 and second.validations == {"val_accuracy_before": 0.5}
    assert second.reward_kl.coef == 0.7 and second.prompts.drawn == 2 and len(second.waiting) == 2
    assert not caplog.records

    third, config = state(KLController.fixed)
    third.load_state_dict(saved, config, {"data.seed", "worker.rollout.n"})
    assert third.reward_kl.coef == 0.5 and third.prompts.drawn == 0 and third.waiting is None
    assert "the prompts are not those of the checkpoint (data.seed): epoch 1 begins anew" in caplog.text
    assert "responses that waited for the next step are dropped, since data.seed, worker.rollout.n" in caplog.text


def test_the_best_step():
    progress = TrainState(None, None, None)
    found = []
    for step, accuracy in enumerate((0.2, 0.1, 0.3, 0.3), 1):
        progress.step = step
        found.append(progress.is_best("val/accuracy", {"val/accuracy": accuracy, "val/reward": 0.0}))
    assert found == [True, False, True, False] and (progress.best, progress.best_step) == (0.3, 3)
    assert not progress.is_best("val/accuracy", {"train/reward": 1.0})  # a step without validation
    assert not progress.is_best(None, {"val/reward": 9.0})
    with pytest.raises(ValueError, match="trainer.save_best='val/acc' is no metric .* has val/accuracy, val/reward"):
        progress.is_best("val/acc", {"val/accuracy": 0.1, "val/reward": 0.0})


@pytest.mark.usefixtures("in_repository")
def test_changes_that_matter_are_told_from_those_that_do_not():
    given = ["data.train_files=x", "worker.actor.model.model_path=x"]
    old = json.loads(json.dumps(settings(compose_config("quickstart", given))))
    same = [
        "trainer.output_dir=elsewhere",
        "trainer.logger=[console]",
        "trainer.save_freq=3",
        "trainer.async_save=true",
    ]
    assert changes(old, settings(compose_config("quickstart", [*given, *same]))) == {}
    other = ["worker.actor.optim.lr=0.5", "~term@algorithm.terms.ref_kl", "trainer.max_steps=7"]
    found = changes(old, settings(compose_config("quickstart", [*given, *other])))
    assert set(found) == {"worker.actor.optim.lr", "algorithm.terms.ref_kl", "trainer.max_steps"}
    assert found["trainer.max_steps"][1] == 7 and found["algorithm.terms.ref_kl"][1] is None


@pytest.fixture
def run(tmp_path, in_repository):
    """A config, and its folder with records of four steps."""
    overrides = ["data.train_files=x", "worker.actor.model.model_path=x", f"trainer.output_dir={tmp_path / 'run'}"]
    config = compose_config("quickstart", overrides)
    folder = RunDir(config)
    for step in range(5):
        folder.add_samples(step, "val", [{"uid": "a"}, {"uid": "b"}])
        folder.add_events([{"step": step}])
    return config


def save(config, step: int, **about) -> str:
    folder = CheckpointFolder(f"{config.trainer.output_dir}/checkpoints")
    save_plain(f"{folder.begin(step)}/trainer.pt", {"step": step})
    return folder.commit(step, {"step": step, "model_only": False, "config": settings(config), **about}, {})


def test_where_a_run_goes_on(run, tmp_path, caplog):
    assert find_resume_point(run) is None
    second, third, _ = save(run, 2), save(run, 3), save(run, 4, model_only=True)
    open(f"{third}/trainer.pt", "wb").close()
    point = find_resume_point(run)
    assert (point.path, point.step, point.state, point.own) == (second, 2, {"step": 2}, True)
    assert "global_step_4 was saved with trainer.save_model_only=true" in caplog.text
    assert f"{third}/trainer.pt has 0 bytes" in caplog.text
    run.trainer.resume = "never"
    assert find_resume_point(run) is None
    run.trainer.resume = third
    with pytest.raises(ValueError, match="trainer.pt has 0 bytes"):
        find_resume_point(run)


def test_the_same_command_with_a_named_checkpoint_does_not_begin_there_twice(run, tmp_path):
    run.trainer.resume = save(run, 2)
    run.trainer.output_dir = str(tmp_path / "other")
    point = find_resume_point(run)
    assert (point.step, point.own) == (2, False)
    RunDir(run)
    assert find_resume_point(run).step == 2  # killed before its first save
    save(run, 3)
    point = find_resume_point(run)
    assert (point.step, point.own) == (3, True)


def test_records_of_later_steps_are_cut_off(run):
    path = f"{run.trainer.output_dir}/samples.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 2, "uid"')
    folder = RunDir(run, resumed_step=2)
    assert [json.loads(line)["step"] for line in open(path)] == [0, 0, 1, 1, 2, 2]
    assert [json.loads(line)["step"] for line in open(folder.file("events.jsonl"))] == [0, 1, 2]
