"""Checkpoints of real shards: resumed bit for bit, over other numbers of ranks, and refused where they are broken."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.actors import build_actor, on_ranks, process_group, weights
from tests.fakes.checkpoints import adam_actor, begin_save, end_save, save, state, train
from tests.fakes.rollouts import make_batch
from verl.checkpoint.files import BrokenCheckpoint, files_in, read_manifest, seal, verify, write_manifest
from verl.checkpoint.folder import CheckpointFolder
from verl.checkpoint.tensors import SaveFailed, load_full_model, saved_tensors
from verl.config.worker import LoRAConfig, Offload, OptimStrategy
from verl.protocol import DataProto
from verl.workers.fsdp.checkpoint import load_state


@pytest.fixture(scope="module")
def batch(assets):
    return make_batch(assets)


@pytest.fixture(scope="module")
def saved(model, batch, tmp_path_factory) -> tuple[Path, dict, dict, dict]:
    return save_on_one_rank(model, batch, tmp_path_factory.mktemp("checkpoints"))


def save_on_one_rank(model: Path, batch: DataProto, root: Path, **options: Any) -> tuple[Path, dict, dict, dict]:
    """A checkpoint of one rank after two updates, the state there, and the state and metrics after a third."""
    with process_group():
        actor = adam_actor(model, **options)
        train(actor, batch, 2)
        path, there = save(actor, root, 2), state(actor)
        torch.rand(7)
        metrics = train(actor, batch, 1)
        return Path(path), there, state(actor), {**metrics, "random": torch.rand(1).item()}


def resumed(model: Path, path: Path, rank: int = 0, **options: Any):
    actor = adam_actor(model, **options)
    load_state(os.path.join(path, "actor"), actor.step, rank)
    return actor


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_one_more_update_after_a_resume_is_the_same_bit_for_bit(model, batch, saved):
    path, there, after, metrics = saved
    with process_group():
        actor = resumed(model, path)
        assert_equal(state(actor), there)
        torch.rand(7)
        found = train(actor, batch, 1)
        assert_equal(state(actor), after)
        assert {**found, "random": torch.rand(1).item()} == metrics
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in there)


KINDS = {
    "frozen vision tower": {"freeze_vision_tower": True},
    "LoRA": {"lora": LoRAConfig(rank=4)},
    "CPU offload": {"offload": Offload.always},
    "bfloat16 compute over float32": {"compute_dtype": "bfloat16"},
    "bfloat16 alone": {"compute_dtype": "bfloat16", "strategy": OptimStrategy.adamw_bf16},
    "LoRA in bfloat16, offloaded": {
        "lora": LoRAConfig(rank=4),
        "compute_dtype": "bfloat16",
        "strategy": OptimStrategy.adamw_bf16,
        "offload": Offload.always,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_keep_weights_and_states_goes_on_bit_for_bit(tied_model, batch, tmp_path, kind):
    path, there, after, _ = save_on_one_rank(tied_model, batch, tmp_path, **KINDS[kind])
    with process_group():
        actor = resumed(tied_model, path, **KINDS[kind])
        assert_equal(state(actor), there)
        train(actor, batch, 1)
        assert_equal(state(actor), after)
    assert {name for name in after if not torch.equal(after[name], there[name])}  # it trains
    lora = "LoRA" in kind
    assert any(".lora_A." in name for name in there) == lora
    assert any(name.startswith("optimizer.compensation.") for name in there) == ("strategy" in KINDS[kind])


def _on_two_ranks(rank: int, model: Path, batch, of_one: Path, root: Path):
    """What two ranks make of one rank's checkpoint, and their own: (state, state an update later) of each."""
    actor = resumed(model, of_one, rank)
    there = state(actor)
    train(actor, batch, 1)
    after = state(actor)
    own = adam_actor(model)
    train(own, batch, 2)
    save(own, root, 2, background=True)
    own_there = state(own)
    train(own, batch, 1)
    return (there, after), (own_there, state(own))


def test_two_ranks_go_on_from_one_and_one_from_two(tied_model, batch, tmp_path):
    path, there, after, _ = save_on_one_rank(tied_model, batch, tmp_path / "one")
    (of_one, of_two), _ = on_ranks(2, _on_two_ranks, tied_model, batch, path, tmp_path)
    assert_equal(of_one[0], there)
    for name, value in after.items():
        torch.testing.assert_close(of_one[1][name], value, atol=2e-3, rtol=0)  # Adam's signs of tiny gradients
    two = tmp_path / "global_step_2"
    verify(str(two))
    with process_group():
        actor = resumed(tied_model, two)
        assert_equal(state(actor), of_two[0])
        train(actor, batch, 1)
        for name, value in state(actor).items():
            torch.testing.assert_close(value, of_two[1][name], atol=2e-3, rtol=0)
    assert {"actor/rank_1.pt", "actor/__1_0.distcp"} <= set(read_manifest(str(two))["files"])


def test_the_background_save_is_of_the_moment_it_was_asked_for(model, batch, tmp_path):
    with process_group():
        actor = adam_actor(model)
        train(actor, batch, 1)
        there = state(actor)
        writer = begin_save(actor, tmp_path, 1, background=True)
        train(actor, batch, 1)  # while it is written
        with pytest.raises(RuntimeError, match="still running"):
            writer.start(str(tmp_path), {}, {}, None, False)
        path = end_save(writer, tmp_path, 1)
        assert_equal(state(resumed(model, Path(path))), there)


def test_the_whole_model_is_read_without_a_process_group(model, saved):
    path, there, _, _ = saved
    found = load_full_model(str(path / "actor"))
    expected = {name.removeprefix("model.inner."): value for name, value in there.items() if name.startswith("model.")}
    assert_equal(found, expected)
    with process_group():
        names = set(weights(build_actor(model)))
    # Of a tied head there is one copy, under the name of the embeddings.
    assert names - set(found) == ({"lm_head.weight"} if "tied" in str(model) else set())


class Malice:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "global_step_2"))


def load(model: Path, path: Path) -> None:
    verify(str(path))
    load_full_model(str(path / "actor"))
    with process_group():
        resumed(model, path)


def renew_manifest(path: Path) -> None:
    """As someone would who wants a changed checkpoint to be believed."""
    names = [name for name in files_in(str(path)) if name != "manifest.json"]
    write_manifest(str(path), {"step": 2}, seal(str(path), names))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rank_0.pt"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(model, copy, tmp_path, name):
    target, planted = copy / "actor" / name, tmp_path / "planted"
    if name.endswith(".distcp"):  # each tensor in it is in torch's own format, which has a pickle inside
        torch.save(Malice(planted), target)
        offsets_to_start(copy / "actor" / ".metadata", target.stat().st_size)
    else:
        target.write_bytes(pickle.dumps(Malice(planted)))
    with pytest.raises(BrokenCheckpoint):
        load(model, copy)
    renew_manifest(copy)
    with pytest.raises(BrokenCheckpoint, match=f"{name} cannot be read"):
        load(model, copy)
    assert not planted.exists()


def offsets_to_start(index: Path, size: int) -> None:
    """Let every tensor of an index begin where the file does."""
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, size
    index.write_bytes(pickle.dumps(metadata))


def test_an_index_that_leads_out_of_its_folder_is_refused(copy):
    index = copy / "actor" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../rank_0.pt"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(BrokenCheckpoint, match=".metadata does not describe"):
        saved_tensors(str(copy / "actor"))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["actor/.metadata", "actor/__0_0.distcp", "actor/rank_0.pt", "manifest.json"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage, "is damaged|has format|is no JSON"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "has .* bytes|is no JSON"),
        (os.remove, "is missing"),
    ],
)
def test_damaged_files_are_refused_by_name(copy, name, harm, said):
    if harm is damage and name == "manifest.json":
        (copy / name).write_text('{"format": 99}')
    else:
        harm(copy / name)
    with pytest.raises(BrokenCheckpoint, match=f"{copy / name} ({said})"):
        verify(str(copy))


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_a_weight(saved, assets, tied_model, model):
    other = assets / "model" if "tied" in str(model) else tied_model
    with process_group(), pytest.raises(ValueError, match="another model .*lacks 'model.inner.lm_head.weight'"):
        resumed(other, saved[0])


def test_a_checkpoint_of_another_optimizer_is_refused(saved, model):
    with (
        process_group(),
        pytest.raises(ValueError, match=r"states of the optimizer AdamW, .* is SGD \(worker.actor.opt"),
    ):
        load_state(os.path.join(saved[0], "actor"), build_actor(model).step, 0)


def _onto_a_full_disk(rank: int, model: Path, batch, root: Path):
    """Two ranks save, then again where only rank 1 may write no large file; returns why, and what is left."""
    actor = adam_actor(model)
    train(actor, batch, 1)
    save(actor, root, 1)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    try:
        begin_save(actor, root, 2).finish()
        reason = ""
    except SaveFailed as error:
        reason = str(error)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    third = save(actor, root, 3)  # the group still works
    return reason, third


def test_a_rank_that_cannot_write_is_said_by_all_and_costs_only_that_save(assets, batch, tmp_path):
    reasons = on_ranks(2, _onto_a_full_disk, assets / "model", batch, tmp_path)
    for reason, third in reasons:
        assert reason.startswith("rank 1: OSError: [Errno 27] File too large") and "rank 0" not in reason
        verify(third)
    folder = CheckpointFolder(str(tmp_path))
    assert folder.steps() == [3, 1] and folder.latest() == folder.checkpoint(3)
    verify(folder.checkpoint(1))


def test_a_checkpoint_is_whole_though_latest_cannot_be_written(tmp_path, monkeypatch, caplog):
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    Path(folder.begin(1), "trainer.pt").write_text("1")
    monkeypatch.setattr(folder, "_point_at", lambda name: os.open("/nowhere/latest", os.O_RDONLY))
    assert folder.commit(1, {"step": 1}, {}) == folder.checkpoint(1) and folder.steps() == [1]
    assert f"{folder.checkpoint(1)} is whole, but {folder.path}/latest could not be written: " in caplog.text
    assert verify(folder.checkpoint(1))["step"] == 1


def test_the_folder_keeps_the_newest_and_what_it_is_told_to(tmp_path, caplog):
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    for step in (1, 2, 3, 4):
        Path(folder.begin(step), "actor").mkdir()
        Path(folder.unfinished(step), "trainer.pt").write_text(str(step))
        folder.commit(step, {"step": step}, {})
    folder.prune(2, keep={1})
    assert folder.steps() == [4, 3, 1] and folder.latest() == folder.checkpoint(4)
    assert folder.set_aside(4).endswith("global_step_4.aside-1")
    folder.begin(5)
    Path(folder.path, "latest.tmp77").write_text("global_")
    with caplog.at_level("INFO", logger="verl"):
        folder.remove_unfinished()
    assert sorted(os.listdir(folder.path)) == ["global_step_1", "global_step_3", "global_step_4.aside-1", "latest"]
    assert caplog.text.count("which a save that was cut short had left") == 2
    folder.begin(5)
    with pytest.raises(FileNotFoundError, match="a folder that all nodes share"):
        folder.commit(5, {}, {"actor/__1_0.distcp": {"size": 1, "crc32": 1}})
    assert folder.steps() == [3, 1]
