"""scripts/gpu_check.py on the CPU: its checks pass with few packages, and what is wrong fails them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
# What a GPU machine need not have: everything but torch, transformers and packages of pure Python.
ABSENT = ["ray", "vllm", "datasets", "pyarrow", "pandas", "PIL", "torchvision", "scipy", "sklearn", "torchdata", "peft"]
ABSENT += ["mathruler", "wandb", "matplotlib"]


@pytest.mark.run
def test_all_checks_pass_with_torch_transformers_and_little_else(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    out = tmp_path / "found.json"
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--cpu", "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["check"]: check for check in json.loads(out.read_text())["checks"]}
    assert [name for name, check in checks.items() if check["outcome"] != "pass"] == ["quickstart"]
    assert checks["quickstart"]["outcome"] == "not run" and checks["two_ranks"]["numbers"]["two_ranks_norm"] > 0
    assert done.stdout.count("pass ") == len(checks) - 1


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_check

    return gpu_check


def test_a_mask_that_lets_responses_see_ahead_fails_the_check_of_attention(gpu_check, monkeypatch):
    lab = gpu_check.Lab(torch.device("cpu"))
    right = gpu_check.segment_attention
    assert gpu_check.check_attention(lab)["text_difference"] < 1e-5

    def wrong(module, query, key, value, mask, *, segments, scaling):
        for bucket in segments.buckets:
            bucket.mask.fill_(True)
        return right(module, query, key, value, mask, segments=segments, scaling=scaling)

    monkeypatch.setattr(gpu_check, "segment_attention", wrong)
    found = gpu_check.run("attention", lab)
    assert found["outcome"] == "fail" and found["reason"].startswith("AssertionError: text: values or gradients differ")


def test_states_that_come_back_changed_fail_the_check_of_parking(gpu_check, monkeypatch):
    lab = gpu_check.Lab(torch.device("cpu"))
    assert gpu_check.run("parking", lab)["outcome"] == "pass"

    class Forgetful(gpu_check.Parking):
        def take_back(self, tensors=None):
            for copy in self.copies.values():
                copy.zero_()
            super().take_back(tensors)

    monkeypatch.setattr(gpu_check, "Parking", Forgetful)
    assert "a state is not what it was" in gpu_check.run("parking", lab)["reason"]


def test_a_gpu_that_holds_no_update_of_the_real_shape_gets_fewer_layers(gpu_check, monkeypatch):
    lab = gpu_check.Lab(torch.device("cuda"))  # nothing is put there
    sizes = {}
    for gib in (80, 24):
        properties = type("Properties", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        model, config, estimate = gpu_check._that_fits(lab, gpu_check.REAL, "papo_grpo", 2048)
        sizes[gib] = (model.text_config.num_hidden_layers, str(config.worker.actor.optim.strategy))
        assert estimate < 0.9 * gib * 2**30
    assert sizes[80] == (36, "adamw") and sizes[24][0] < 36
