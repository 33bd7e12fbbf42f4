"""Real runs that are cut short and started again: the same numbers, nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakes.runs import PARTIAL, numbers, records, start
from verl.checkpoint.files import load_plain, read_manifest, verify
from verl.checkpoint.folder import CheckpointFolder
from verl.checkpoint.tensors import load_full_model, read_tensors, saved_tensors
from verl.utils.files import FolderInUse, hold_folder

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> list[str]:
    """All that has a state of its own at once: groups that wait, a critic, an adaptive KL, a schedule, two ranks.

    Of twice three groups four are used, and two wait; a step later one does."""
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(PARTIAL)
    return [
        f"worker.reward.reward_function={reward}:score",
        "algorithm.online_filtering=true",
        "data.mini_rollout_batch_size=3",
        "algorithm.adv_estimator=gae",
        "algorithm.reward_kl={coef: 0.05, controller: adaptive, horizon: 50, target: 0.001}",
        "worker.actor.optim={lr: 0.01, lr_scheduler_type: cosine}",
        "trainer.max_steps=4",
        "trainer.val_freq=1",
        "trainer.save_freq=2",
        "trainer.save_limit=0",
    ]


@pytest.fixture(scope="module")
def whole(assets, everything, tmp_path_factory) -> tuple[Path, str]:
    """Four steps in one go, saved behind the second and the fourth while training went on."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = start(assets, output, *everything, "trainer.async_save=true")
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stderr


@pytest.fixture(scope="module")
def resumed(assets, everything, whole, tmp_path_factory) -> tuple[Path, str]:
    """The same command again, in a folder as a crash in step 5 of more may leave it: its newest checkpoint damaged,
    a save and an export half done, and half a line."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(whole[0], output)
    (output / "summary.json").unlink()
    (output / "model").rename(output / "model.tmp77")
    damaged = output / "checkpoints/global_step_4/actor/__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (output / "checkpoints/.global_step_5.tmp/actor").mkdir(parents=True)
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "actor')
    done = start(assets, output, *everything)
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stderr


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in saved_tensors(str(folder)).items()}
    read_tensors(str(folder), found, alone=True)
    return found


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_two_steps_a_resume_and_two_steps_are_four_steps(whole, resumed):
    """Bit for bit: every metric that is no clock's, every generation, every tensor, every plain value."""
    (one, _), (two, _) = whole, resumed
    assert [record["step"] for record in numbers(two)] == [0, 1, 2, 3, 4]
    assert numbers(two) == numbers(one)
    assert records(two / "samples.jsonl") == records(one / "samples.jsonl")
    of_one, of_two = (path / "checkpoints/global_step_4" for path in (one, two))
    for role in ("actor", "critic"):
        found, expected = tensors(of_two / role), tensors(of_one / role)
        assert set(found) == set(expected) and any(name.startswith("optimizer.exp_avg.") for name in expected)
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
        for rank in range(2):
            assert same(*(load_plain(str(path / role / f"rank_{rank}.pt")) for path in (of_two, of_one)))
    states = [load_plain(str(path / "trainer.pt")) for path in (of_two, of_one)]
    for state in states:
        assert state.pop("seconds") > 0
        for outcome in state["waiting"]["objects"]["outcome"] if state["waiting"] else ():
            assert outcome.pop("seconds") > 0
    assert same(*states)
    assert (two / "model/model.safetensors").read_bytes() == (one / "model/model.safetensors").read_bytes()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (two, one)]
    for summary in summaries:
        assert summary.pop("seconds") > 0
    assert summaries[0] == summaries[1] and "val_accuracy_before" in summaries[0]


def test_the_runs_above_had_a_state_to_lose(whole):
    """Between the second and the third step everything that is carried was something."""
    state = load_plain(str(whole[0] / "checkpoints/global_step_2/trainer.pt"))
    assert len(state["waiting"]["objects"]["outcome"]) == 3
    assert state["reward_kl_coef"] != 0.05 and state["prompts"]["drawn"] > 0
    assert state["watchdog"]["tracks"]["actor/perception_kl"]["values"]
    assert state["weight_version"] == 2 and state["best"] is None
    rates = [record["actor/lr"] for record in numbers(whole[0])[1:]]
    assert len(set(rates)) == 4


def test_what_was_broken_or_half_done_is_said_and_out_of_the_way(whole, resumed):
    output, log = resumed
    checkpoints = output / "checkpoints"
    assert f"skipped a checkpoint: {checkpoints}/global_step_4/actor/__1_0.distcp is damaged" in log
    assert f"going on from {checkpoints}/global_step_2, after step 2" in log
    assert f"removed {checkpoints}/.global_step_5.tmp, which a save that was cut short had left" in log
    assert f"removed {output}/model.tmp77" in log
    assert "metrics.jsonl: 3 lines of steps after 2 are cut off" in log
    assert "changed since the checkpoint" not in log  # a folder's name and async_save change no number
    assert {path.name for path in checkpoints.iterdir()} == {
        *("global_step_2", "global_step_4", "global_step_4.aside-1", "latest"),
    }
    assert (checkpoints / "latest").read_text() == "global_step_4\n"
    verify(str(checkpoints / "global_step_4"))
    assert {path.name for path in output.iterdir()} == {path.name for path in whole[0].iterdir()}


def test_the_exporters_view_of_a_checkpoint(whole):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    actor = whole[0] / "checkpoints/global_step_4/actor"
    exported = AutoModelForImageTextToText.from_pretrained(whole[0] / "model", dtype=torch.float32)
    assert same(load_full_model(str(actor)), exported.state_dict())
    config = AutoConfig.from_pretrained(actor / "huggingface")
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    AutoProcessor.from_pretrained(actor / "huggingface")
    assert not list((actor / "huggingface").glob("*.safetensors"))


def test_a_run_that_is_complete_says_so_and_ends(assets, everything, whole):
    before = {path.name: path.stat().st_mtime for path in whole[0].iterdir() if path.name != "config.yaml"}
    done = start(assets, whole[0], *everything)
    assert done.returncode == 0 and f"{whole[0]} is complete: trainer.max_steps=N goes on" in done.stderr
    assert "done: 4 steps" in done.stderr and "policy with" not in done.stderr
    assert {path.name: path.stat().st_mtime for path in whole[0].iterdir() if path.name != "config.yaml"} == before


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ("algorithm.terms.entropy.coef=0.5", "algorithm.terms.entropy.coef: 0.01 -> 0.5"),
        ("+term@algorithm.terms.more=entropy", r'algorithm.terms.more: null -> \{.*"kind": "entropy"'),
        ("algorithm.views.masked.prob=0.3", "algorithm.views.masked.prob: 0.6 -> 0.3"),
        ("worker.actor.model.model_path={other}", 'worker.actor.model.model_path: ".*" -> ".*/another"'),
    ],
)
def test_another_experiment_does_not_go_on_in_the_folder(assets, everything, whole, tmp_path, change, listed):
    """The list of what differs, and the ways out; the run and its records are as they were."""
    shutil.copytree(assets / "model", tmp_path / "another")
    change = change.format(other=tmp_path / "another")
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    done = start(assets, whole[0], *everything, "trainer.max_steps=5", change)
    assert done.returncode == 1 and {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before
    error = done.stderr[done.stderr.index("error: ") :]
    assert re.search(listed, error) and "another experiment, and this one would go on from its step 4" in error
    assert "trainer.resume=never begins anew and moves that run aside" in error
    assert f"trainer.resume={whole[0]}/checkpoints/global_step_4 goes on from it with the new settings" in error


def test_a_folder_belongs_to_one_process_at_a_time(assets, everything, whole):
    with hold_folder(str(whole[0])):
        done = start(assets, whole[0], *everything)
    holder = f"process {os.getpid()} on {socket.gethostname()} since 20"
    assert done.returncode == 1
    assert f"error: '{whole[0]}' is in use by {holder}" in done.stderr
    assert {path.name for path in whole[0].parent.iterdir()} == {"run"}  # the lock is gone with its process


def test_a_lock_ends_with_its_process_and_stays_with_the_name(tmp_path):
    """A folder that is moved aside leaves its name held; a kill frees it, though forks of the killed one live on."""
    code = f"""
import os
from verl.utils.files import hold_folder
with hold_folder("{tmp_path}/run"):
    os.mkdir("{tmp_path}/run")
    os.rename("{tmp_path}/run", "{tmp_path}/aside")
    if os.fork():
        print("held", flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUse, match=f"'{tmp_path}/run' is in use by process {process.pid} on "):
        hold_folder(f"{tmp_path}/run").__enter__()
    process.kill()
    process.wait()
    with hold_folder(f"{tmp_path}/run"):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    assert not (tmp_path / ".run.lock").exists()
    process.stdin.close()  # its fork ends, and removes no lock of others


def test_another_run_goes_on_from_a_named_checkpoint_on_one_rank(assets, everything, whole, tmp_path):
    """Two ranks' shards on one; what changed is said; the best step and the newest are kept."""
    path = whole[0] / "checkpoints/global_step_2"
    changes = ["trainer.n_gpus_per_node=1", "trainer.max_steps=5", f"trainer.resume={path}"]
    saving = ["trainer.save_freq=1", "trainer.save_limit=1", "trainer.save_best=val/accuracy"]
    done = start(assets, tmp_path / "run", *everything, *changes, *saving)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "changed since the checkpoint: trainer.n_gpus_per_node: 2 -> 1" in done.stderr
    assert "changed since the checkpoint: trainer.max_steps: 4 -> 5" in done.stderr
    found, expected = numbers(tmp_path / "run"), numbers(whole[0])
    assert [record["step"] for record in found] == [3, 4, 5]
    assert {r["step"] for r in records(tmp_path / "run/samples.jsonl")} == {3, 4, 5}
    names = ("train/reward", "rollout/response_length_mean", "actor/pg_loss", "critic/vf_loss", "train/reward_kl_coef")
    for name in names:  # the third step was drawn from the same weights; only sums have another order
        assert found[0][name] == pytest.approx(expected[3][name], rel=1e-3, abs=1e-4), name
    accuracies = {record["step"]: record["val/accuracy"] for record in found}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    folder = CheckpointFolder(str(tmp_path / "run/checkpoints"))
    assert set(folder.steps()) == {best, 5} and read_manifest(folder.checkpoint(5))["world_size"] == 1


def test_a_checkpoint_that_is_not_there_ends_the_command_in_one_line(assets, tmp_path):
    done = start(assets, tmp_path / "run", f"trainer.resume={tmp_path}/global_step_9")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"{tmp_path}/global_step_9/manifest.json is missing" in last


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a small disk is a tmpfs in a namespace of its own, not allowed here")
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(assets, tmp_path):
    """The disk holds one checkpoint. The second save fails and training goes on; the last one's failure is the
    command's, and the first checkpoint is whole."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    overrides = ["trainer.max_steps=3", "trainer.save_freq=1", "trainer.save_model=false", "trainer.n_gpus_per_node=1"]
    overrides += ["trainer.val_freq=0", "trainer.val_before_train=false", "trainer.val_after_train=false"]
    within = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=20m tmpfs {disk}; "$@"; s=$?; cp -r {disk} {kept}; exit $s',
    ]
    done = start(assets, disk / "run", *overrides, within=[*within, "sh"])
    assert done.returncode == 1, done.stderr[-4000:]
    checkpoints = kept / "run/checkpoints"
    failed = f"the checkpoint of step 2 could not be saved in {disk}/run/checkpoints (0.0 GiB free): actor, "
    assert failed in done.stderr and "No space left on device" in done.stderr
    assert f"Newest whole checkpoint: {disk}/run/checkpoints/global_step_1. Training goes on" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 3 could not be saved")
    assert {path.name for path in checkpoints.iterdir()} == {"global_step_1", "latest"}
    assert (checkpoints / "latest").read_text() == "global_step_1\n"
    verify(str(checkpoints / "global_step_1"))
    assert [record["step"] for record in records(kept / "run/metrics.jsonl")] == [1, 2, 3]


@pytest.mark.vllm
def test_with_two_vllm_engines_a_resumed_run_draws_the_same_responses(assets, tmp_path):
    overrides = ["worker.rollout.name=vllm", "trainer.max_steps=3", "trainer.save_freq=2", "trainer.save_limit=0"]
    overrides += ["trainer.samples_per_step=12", "trainer.n_gpus_per_node=1", "worker.actor.optim.lr=0.01"]
    overrides += ["worker.rollout.data_parallel_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = start(assets, one, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 rollout engine(s)" in done.stderr and "rollout engine vllm" in done.stderr
    before, *steps = records(one / "metrics.jsonl")
    assert "val/accuracy" in before and "val/accuracy" in steps[-1] and (one / "model" / "config.json").exists()
    for step, record in enumerate(steps):
        assert record["rollout/log_prob_diff_max"] < 1e-4 and record["rollout/mismatch_kl"] < 1e-8
        assert record["rollout/weight_version"] == step
    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoints/global_step_3")
    done = start(assets, two, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert records(two / "samples.jsonl") == records(one / "samples.jsonl")
    assert numbers(two)[:3] == numbers(one)[:3]
    last, expected = numbers(two)[3], numbers(one)[3]
    assert set(last) == set(expected) and last["rollout/weight_version"] == 2
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
