"""EasyR1's checkpoints, as FSDP2 writes them in real ranks, to Hugging Face folders: every weight, and nothing else."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor

from papo.tools.export.merger import main
from tests.conftest import REPOSITORY
from tests.fakes.actors import process_group
from verl.checkpoint.files import BrokenCheckpoint
from verl.legacy.shards import merge_shards


def new_easyr1(folder: Path, model: Path) -> Path:
    """`global_step_5/actor` as EasyR1 makes it, still without the ranks' files."""
    actor = folder / "global_step_5" / "actor"
    skip = shutil.ignore_patterns("*.safetensors", "quickstart_settings.json")
    shutil.copytree(model, actor / "huggingface", ignore=skip)
    return actor


def save_ranks(actor: Path, model: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    """Write the files of a model that is sharded over a mesh of this shape, one process for each place in it."""
    arguments = (str(actor.parent / "store"), actor, model, shape, names)
    # Forks of this process, which has imported everything, are there at once.
    mp.start_processes(_save_rank, arguments, nprocs=torch.Size(shape).numel(), start_method="fork")


def _save_rank(rank: int, store: str, actor: Path, path: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    world = torch.Size(shape).numel()
    with process_group(rank, world, store):
        model = AutoModelForImageTextToText.from_pretrained(path)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.save(model.state_dict(), actor / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save({"step": rank}, actor / f"extra_state_world_size_{world}_rank_{rank}.pt")
        dist.barrier()


@pytest.fixture(scope="module")
def saved(assets, tmp_path_factory) -> Path:
    actor = new_easyr1(tmp_path_factory.mktemp("easyr1"), assets / "model")
    save_ranks(actor, assets / "model", (2,), ("fsdp",))
    return actor


@pytest.fixture
def actor(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "global_step_5" / "actor"))


def expect_weights(folder: Path, model: Path) -> None:
    """The folder loads in bfloat16 with every weight of `model`, rounded."""
    found = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    expected = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    assert found.dtype == torch.bfloat16 and found.state_dict().keys() == expected.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    assert AutoProcessor.from_pretrained(folder).tokenizer.vocab_size > 100


def test_the_command_that_easyr1s_users_type(actor, assets):
    command = [sys.executable, "scripts/model_merger.py", "--local_dir", str(actor)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{actor / 'huggingface'}\n"
    expect_weights(actor / "huggingface", assets / "model")
    assert not list(actor.glob("*.tmp*"))
    main(["--local_dir", str(actor.parent), "--dtype", "fp32"])  # again, from the step's folder
    assert AutoModelForImageTextToText.from_pretrained(actor / "huggingface", dtype="auto").dtype == torch.float32


def test_hybrid_sharding_and_a_tied_head(tied_model, tmp_path):
    actor = new_easyr1(tmp_path, tied_model)
    save_ranks(actor, tied_model, (2, 2), ("ddp", "fsdp"))
    assert len(list(actor.glob("model_*.pt"))) == 4
    main(["--local_dir", str(actor)])
    expect_weights(actor / "huggingface", tied_model)
    found = AutoModelForImageTextToText.from_pretrained(actor / "huggingface")
    assert found.lm_head.weight.data_ptr() == found.model.language_model.embed_tokens.weight.data_ptr()


def test_names_as_older_transformers_had_them_and_plain_slices(assets, actor):
    """Before 4.52 the towers were `model` and `visual`; before DTensor each rank had a slice of the first axis."""
    model = AutoModelForImageTextToText.from_pretrained(assets / "model")
    whole = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in model.state_dict().items()
    }
    for rank in range(2):
        part = {name: weight.chunk(2)[rank].clone() for name, weight in whole.items()}
        torch.save(part, actor / f"model_world_size_2_rank_{rank}.pt")
    main(["--local_dir", str(actor)])
    expect_weights(actor / "huggingface", assets / "model")


def rank_file(actor: Path, rank: int) -> Path:
    return actor / f"model_world_size_2_rank_{rank}.pt"


def test_files_that_are_missing_or_of_another_run_are_named(actor):
    shutil.copy(rank_file(actor, 1), actor / "model_world_size_3_rank_1.pt")
    with pytest.raises(BrokenCheckpoint, match="files of runs with 2 and 3 ranks"):
        merge_shards(str(actor), torch.bfloat16)
    rank_file(actor, 0).rename(actor / "model_world_size_3_rank_0.pt")
    rank_file(actor, 1).unlink()
    with pytest.raises(BrokenCheckpoint, match="model_world_size_3_rank_2.pt is missing, 1 of 3"):
        merge_shards(str(actor), torch.bfloat16)
    # A run of two whose files say three.
    shutil.copy(actor / "model_world_size_3_rank_1.pt", actor / "model_world_size_3_rank_2.pt")
    with pytest.raises(BrokenCheckpoint, match="model_world_size_3_rank_2.pt and the others.*3 ranks.*mesh of 2"):
        merge_shards(str(actor), torch.bfloat16)


@pytest.mark.parametrize("size", [0, 1000, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_named(actor, size):
    path = rank_file(actor, 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if size < 1 else size])
    with pytest.raises(BrokenCheckpoint, match="rank_1.pt cannot be read"):
        merge_shards(str(actor), torch.bfloat16)


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_refused_and_not_run(actor, tmp_path, capsys):
    state = torch.load(rank_file(actor, 0), weights_only=False)
    state["model.extra"] = Malice(tmp_path / "ran")
    torch.save(state, rank_file(actor, 0))
    with pytest.raises(SystemExit, match="error: .*rank_0.pt holds (posix|os).system, which no state dict"):
        main(["--local_dir", str(actor)])
    rank_file(actor, 0).write_bytes(pickle.dumps(Malice(tmp_path / "ran")))
    with pytest.raises(SystemExit, match="error: .*rank_0.pt"):
        main(["--local_dir", str(actor)])
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], rank_file(actor, 0))
    with pytest.raises(SystemExit, match="rank_0.pt is no state dict"):
        main(["--local_dir", str(actor)])


def test_what_others_have_declared_safe_is_not_used_and_still_declared_afterwards(actor, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([os.system, (os.system, "posix.system")]):
        state = torch.load(rank_file(actor, 0), weights_only=False)
        torch.save(state | {"model.extra": Malice(tmp_path / "ran")}, rank_file(actor, 0))
        with pytest.raises(BrokenCheckpoint, match="rank_0.pt holds posix.system"):
            merge_shards(str(actor), torch.bfloat16)
        assert os.system in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before and not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_refused(actor, families):
    with pytest.raises(SystemExit, match="--dtype int8: known are bf16"):
        main(["--local_dir", str(actor), "--dtype", "int8"])
    shutil.copy(families["qwen2_vl"] / "model" / "config.json", actor / "huggingface" / "config.json")
    with pytest.raises(SystemExit, match="weights .*huggingface/config.json"):
        main(["--local_dir", str(actor)])
    (actor / "huggingface" / "config.json").unlink()
    with pytest.raises(SystemExit, match="huggingface' has no config.json"):
        main(["--local_dir", str(actor)])


def test_an_upload_that_fails_leaves_the_merged_folder(actor, assets):
    with pytest.raises(SystemExit, match="the upload to 'someone/model' failed: .*The folder is whole"):
        main(["--local_dir", str(actor), "--hf_upload_path", "someone/model"])
    expect_weights(actor / "huggingface", assets / "model")
