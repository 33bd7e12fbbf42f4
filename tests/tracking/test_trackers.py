"""Every tracker keeps what it is given, and none but the record can end a run."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys

import pytest
from PIL import Image

from papo.terms import PerceptionKLConfig
from tests.conftest import REPOSITORY
from tests.fakes.pins import setup_values
from verl.config.config import Config
from verl.config.worker import RewardFunctionConfig
from verl.tracking import TRACKERS, Tracker, Trackers, check_trackers
from verl.tracking.run_info import flat_settings, read_run_id, settings, write_run_id
from verl.tracking.trackers import is_installed
from verl.trainer.run_dir import RunDir

PACKAGED = [name for name in TRACKERS if TRACKERS[name].package]
ROWS = [
    {
        "uid": "val.parquet:0",
        "prompt": "<image>Add the digits.",
        "response": "<think>\n  3+4\n</think> \\boxed{7} | **7**",
        "answer": "7",
        "score/overall": 1.0,
        "image": Image.new("RGB", (56, 28), "white"),
        "masked": Image.new("RGB", (56, 28), "black"),
    },
    {"uid": "val.parquet:1", "prompt": "1+1?", "response": "3", "answer": "2", "score/overall": 0.0},
]


def config(*logger: str) -> Config:
    built = Config()
    built.trainer.logger = list(logger)
    built.trainer.project_name, built.trainer.experiment_name = "digits", "first"
    for part, name in (
        (built.data, "train_files"),
        (built.worker.actor.model, "model_path"),
        (built.worker.reward, "reward_function"),
    ):
        setattr(part, name, "x")
    return built


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not is_installed(package), reason=f"{package} is not installed: pip install -e '.[{package}]'"
    )


def run(name: str, folder, succeeded: bool = True) -> None:
    """A start, two steps and a table of generations."""
    tracker = TRACKERS[name](str(folder), config(name))
    tracker.log(0, {"val/accuracy": 0.25})
    tracker.log_generations(1, ROWS)
    tracker.log(1, {"actor/grad_per_token/entropy": 0.5, "val/accuracy": 0.5, "actor/odd": math.nan})
    tracker.close(succeeded)


def test_jsonl_holds_one_object_per_step_and_no_nan(tmp_path):
    run("jsonl", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "val/accuracy": 0.25},
        {"step": 1, "actor/odd": None, "actor/grad_per_token/entropy": 0.5, "val/accuracy": 0.5},
    ]


def test_console_shows_a_line_per_step(tmp_path, capsys):
    built = config()
    built.algorithm.terms["perception_kl"] = PerceptionKLConfig()
    TRACKERS["console"](str(tmp_path), built).log(7, {"train/reward": 0.5, "actor/perception_kl": 0.12345, "x": 1})
    assert capsys.readouterr().out.split() == ["step", "7", "reward", "0.500", "perception_kl", "0.1235"]


@needs("tensorboard")
def test_tensorboard_reads_its_own_files_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/accuracy")] == [(0, 0.25), (1, 0.5)]
    assert [e.value for e in events.Scalars("actor/grad_per_token/entropy")] == [0.5]
    assert set(events.Tags()["images"]) == {"val_generations/0/image", "val_generations/0/masked"}
    (picture,) = events.Images("val_generations/0/masked")
    assert (picture.step, picture.width, picture.height) == (1, 56, 28)
    (text,) = events.Tensors("val_generations/0/text_summary")
    assert b"    <think>\n      3+4\n    </think> \\boxed{7} | **7**" in text.tensor_proto.string_val[0]
    (text,) = events.Tensors("val_generations/1/text_summary")
    assert b"**answer**\n\n    2" in text.tensor_proto.string_val[0]
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["trainer.seed"].number_value == 1 and hparams["trainer.experiment_name"].string_value == "first"


@needs("wandb")
def test_wandb_offline_writes_into_the_runs_folder_and_goes_on_under_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    run("wandb", folder)
    run_id = read_run_id(str(folder), "wandb")
    (written,) = (folder / "wandb").glob(f"offline-run-*-{run_id}")
    assert (written / f"run-{run_id}.wandb").stat().st_size > 0
    (table,) = written.glob("files/media/table/val/generations_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(ROWS[0]) and content["data"][1][:5] == list(ROWS[1].values())
    # The pictures of a table wait in its artifact until they are sent.
    staged = [path.read_bytes() for path in (tmp_path / "data" / "artifacts").rglob("*") if path.is_file()]
    assert sum(content.startswith(b"\x89PNG") for content in staged) == 2
    run("wandb", folder, succeeded=False)
    assert read_run_id(str(folder), "wandb") == run_id and {p.name for p in tmp_path.iterdir()} == {"data", "run"}


@needs("mlflow")
def test_mlflow_keeps_settings_steps_pictures_and_how_the_run_ended(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = tmp_path / "run"
    folder.mkdir()
    run("mlflow", folder)
    client, run_id = MlflowClient(), read_run_id(str(folder), "mlflow")
    found = client.get_run(run_id)
    assert client.get_experiment(found.info.experiment_id).name == "digits" and found.info.run_name == "first"
    assert found.info.status == "FINISHED" and found.data.params["trainer.seed"] == "1"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "val/accuracy")] == [(0, 0.25), (1, 0.5)]
    table = json.loads(open(client.download_artifacts(run_id, "val_generations/step_000001.json")).read())
    assert table["rows"][1] == ROWS[1] and "image" not in table["rows"][0]
    pictures = [artifact.path for artifact in client.list_artifacts(run_id, "images")]
    assert any("masked" in path for path in pictures) and len(pictures) >= 2
    run("mlflow", folder, succeeded=False)
    assert read_run_id(str(folder), "mlflow") == run_id and client.get_run(run_id).info.status == "FAILED"


@needs("swanlab")
def test_swanlab_offline_writes_into_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    run("swanlab", folder)
    written = [path for path in (folder / "swanlab").rglob("*") if path.is_file()]
    assert len([path for path in written if path.suffix == ".png"]) == 2
    assert read_run_id(str(folder), "swanlab") and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_trackers_are_imported_only_when_named():
    code = f"import sys, verl.tracking; assert not set({PACKAGED}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=120)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_extra_that_an_error_names_brings_the_package(name):
    package = TRACKERS[name].package
    assert any(requirement.startswith(f"{package}>=") for requirement in setup_values()["EXTRAS"][package])


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown tracker .trainer.logger. 'comet'; known: console, jsonl, mlflow"):
        check_trackers(["console", "comet"])
    name = "tracker_of_nobody"

    @TRACKERS.register(name)
    class NotInstalled(Tracker):
        package = name

    message = rf"names '{name}', and the package {name} is not installed: run `pip install -e '.\[{name}\]'`"
    with pytest.raises(ValueError, match=message):
        check_trackers([name])
    (tmp_path / name).mkdir()  # as a tracker's own log folder may lie where a run is started
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_trackers([name])
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)  # forgets what it found there before
    check_trackers([name])


@TRACKERS.register("unreliable")
class Unreliable(Tracker):
    """Works until step 2; its server is away when the project is called `away`."""

    def __init__(self, output_dir, config):
        if config.trainer.project_name == "away":
            raise ConnectionError("no route to the server")
        self.seen = []

    def log(self, step, metrics):
        if step == 2:
            raise ConnectionError("the server is gone")
        self.seen.append(step)


def test_a_tracker_that_fails_is_switched_off_and_the_record_goes_on(tmp_path, caplog):
    trackers = Trackers(str(tmp_path), config("unreliable", "jsonl"))
    unreliable = trackers.active["unreliable"]
    with caplog.at_level(logging.WARNING, logger="verl"):
        for step in range(1, 5):
            trackers.log(step, {"a": step / 2})
    trackers.close(succeeded=True)
    assert unreliable.seen == [1] and list(trackers.active) == ["jsonl"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    (record,) = caplog.records
    assert "'unreliable' has failed and is switched off" in record.message
    assert "ConnectionError: the server is gone" in record.message


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path):
    trackers = Trackers(str(tmp_path), config("jsonl"))
    trackers.active["jsonl"].file.close()
    with pytest.raises(ValueError, match="closed file"):
        trackers.log(1, {"a": 1.0})


def test_a_tracker_that_does_not_start_is_named(tmp_path):
    wanted = config("jsonl", "unreliable")
    wanted.trainer.project_name = "away"
    with pytest.raises(ValueError, match="trainer.logger: 'unreliable' does not start: .*no route to the server"):
        Trackers(str(tmp_path), wanted)


def test_thumbnails_are_wanted_only_by_trackers_that_show_them(tmp_path):
    assert not Trackers(str(tmp_path), config("console", "jsonl")).show_generations
    assert Trackers(str(tmp_path), config("jsonl", "tensorboard")).show_generations


def test_settings_are_plain_values_and_a_run_keeps_its_id(tmp_path):
    plain, flat = settings(config("jsonl")), flat_settings(config("jsonl"))
    assert json.loads(json.dumps(plain)) == plain and plain["trainer"]["device"] == "auto"
    assert flat["trainer.seed"] == 1 and flat["trainer.logger"] == "['jsonl']" and flat["trainer.max_steps"] == "None"
    secret = RewardFunctionConfig("a.py:f", {"api_key": "s3cret", "judge": {"auth_token": "s3cret"}, "max_tokens": 5})
    own = config("jsonl")
    own.worker.reward.reward_function_kwargs = {"password": "s3cret", "format_weight": 0.1, "token": None}
    own.worker.reward.extra = {"judge": secret}
    own.worker.rollout.engine_kwargs = {"hf_token": "s3cret", "seed": 3}
    hidden = settings(own)
    assert "s3cret" not in json.dumps(hidden) and "s3cret" not in json.dumps(flat_settings(own))
    assert hidden["worker"]["reward"]["reward_function_kwargs"] == {
        "password": "***",
        "format_weight": 0.1,
        "token": None,
    }
    judge = hidden["worker"]["reward"]["extra"]["judge"]["reward_function_kwargs"]
    assert judge == {"api_key": "***", "judge": {"auth_token": "***"}, "max_tokens": 5}
    assert hidden["worker"]["rollout"]["engine_kwargs"] == {"hf_token": "***", "seed": 3}
    assert hidden["data"]["prompt_key"] == "problem"  # a setting of the framework is no secret
    own.trainer.output_dir = str(tmp_path / "run")
    RunDir(own)
    assert "s3cret" not in (tmp_path / "run/config.yaml").read_text()
    assert read_run_id(str(tmp_path), "wandb") is None
    write_run_id(str(tmp_path), "wandb", "abc123")
    assert read_run_id(str(tmp_path), "wandb") == "abc123" and read_run_id(str(tmp_path), "mlflow") is None
