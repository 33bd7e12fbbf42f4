"""`papo export`: from a run that two real ranks have trained to a folder that speaks as the trainer's engine does."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from papo.cli import main
from papo.tools.export.merger import main as merge
from tests.fakes.actors import on_ranks, process_group
from tests.fakes.cluster import MIXED
from tests.fakes.rollouts import make_batch
from tests.fakes.rows import write_parquet
from verl.algorithms.losses.compose import build_terms, coefficients
from verl.checkpoint.files import verify
from verl.checkpoint.folder import CheckpointFolder
from verl.config.compose import compose_config
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor, load_special_tokens
from verl.protocol import DataProto
from verl.tracking.run_info import settings
from verl.workers.fsdp.checkpoint import StateWriter
from verl.workers.model_worker import ActorWorker
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.hf_engine import HFEngine

METRICS = [
    {"step": 0, "val/accuracy": 0.25, "val/reward": 0.3},
    {"step": 1, "train/reward": 0.5},
    {"step": 2, "val/accuracy": 0.75, "val/reward": 0.6},
    {"step": 4, "val/accuracy": 0.5, "val/reward": 0.65},
    {"step": 6, "val/accuracy": 0.99, "val/reward": 0.99},  # after the checkpoints
]


def train(rank: int, assets: Path, model: Path, run: Path) -> dict[str, torch.Tensor]:
    """Checkpoints of steps 2 and 4 in `run`; returns what the engine gets after step 4."""
    overrides = [
        f"worker.actor.model.model_path={model}",
        "data.train_files=/home/someone/train.parquet",
        "worker.actor.optim.lr=0.003",
        "data.max_response_length=10",
        "algorithm.terms.perception_kl.schedule.warmup_steps=7",
    ]
    config = compose_config("papo_grpo_live", overrides)
    world = dist.get_world_size()
    worker = ActorWorker("actor", config, rank, world, "cpu", 1)
    worker.writer = StateWriter()  # as `join` makes it
    worker.build(total_updates=4)
    folder = CheckpointFolder(str(run / "checkpoints"))
    for step in (2, 4):
        for _ in range(2):
            coefs = coefficients(build_terms(config.algorithm.terms), step, 4)
            rows = make_batch(assets).chunk(world)[rank]
            worker.take_rows(rows, [len(rows)])
            worker.update_policy(DataProto(rows.tensors), coefs)
        if rank == 0:
            os.mkdir(os.path.join(folder.begin(step), "actor"))
        dist.barrier()
        worker.start_save(os.path.join(folder.unfinished(step), "actor"), optimizer=step == 2, background=False)
        parts: list[dict] = [{}] * world
        dist.all_gather_object(parts, worker.finish_save())
        if rank == 0:
            entries = {f"actor/{name}": entry for part in parts for name, entry in part.items()}
            folder.commit(step, {"step": step, "world_size": world, "config": settings(config)}, entries)
        dist.barrier()
    worker.send_through("object_store")
    sent = {}
    for layout in worker.plan_weights():
        data = worker.send_bucket(layout, rank == 0)
        if rank == 0:
            sent |= {name: weight.clone() for name, weight in layout.unpack(torch.from_numpy(data.copy()))}
    return sent


def write_metrics(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS) + '{"step": 7, "val/a')


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    run = tmp_path_factory.mktemp("runs") / "first"
    write_metrics(run)
    return run, on_ranks(2, train, assets, assets / "model", run)[0]


def greedy(assets: Path, model: Path, tmp_path: Path, sent: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Tokens [4, R] that the hf engine says to prompts with and without images, with the weights of `model` or others
    in their place."""
    path = write_parquet(tmp_path / "prompts.parquet", MIXED)
    config = compose_config("quickstart", [f"data.train_files={path}", f"worker.actor.model.model_path={model}"])
    vision = VisionProcessor(str(assets / "model"), 784, 12544)
    data = PromptDataset(path, "k", replace(config.data, format_prompt=None), vision)
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(len(MIXED))])
    engine = HFEngine(config, load_special_tokens(str(model)), torch.device("cpu"))
    if sent is not None:
        engine.model.load_state_dict(sent)
    sampling = [SamplingParams(n=1, temperature=0.0, top_p=1.0, top_k=-1, max_tokens=12, seed=0)] * len(prompts)
    return engine.generate(prompts, sampling)["responses"]


def test_the_export_of_a_run_says_what_the_trainers_engine_said(assets, trained, tmp_path, capsys):
    run, sent = trained
    out = tmp_path / "out"
    main(["export", str(run), str(out), "--dtype", "fp32"])
    assert capsys.readouterr().out == f"{out}\n" and not list(tmp_path.glob("*.tmp*"))
    expected = greedy(assets, assets / "model", tmp_path, sent)
    assert torch.equal(greedy(assets, out, tmp_path), expected)
    assert not torch.equal(greedy(assets, assets / "model", tmp_path), expected)
    found = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert found.dtype == torch.float32 and found.state_dict().keys() == sent.keys()
    assert all(torch.equal(weight, sent[name]) for name, weight in found.state_dict().items())
    assert (
        AutoProcessor.from_pretrained(out).chat_template
        == AutoProcessor.from_pretrained(assets / "model").chat_template
    )
    assert GenerationConfig.from_pretrained(out).eos_token_id is not None
    assert "quickstart_settings.json" not in os.listdir(out)


def test_best_latest_and_every_way_to_name_a_checkpoint(trained, tmp_path):
    run, sent = trained
    four = run / "checkpoints" / "global_step_4"
    for number, arguments in enumerate(([run], [four], [four / "actor"])):
        out = tmp_path / str(number)
        main(["export", *map(str, arguments), str(out)])
        found = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
        assert found.dtype == torch.bfloat16
        assert all(torch.equal(weight, sent[name].bfloat16()) for name, weight in found.state_dict().items())
    main(["export", str(run), str(tmp_path / "best"), "--best"])
    main(["export", str(run), str(tmp_path / "reward"), "--best", "val/reward"])
    assert "after step 2 " in (tmp_path / "best" / "README.md").read_text()  # the highest accuracy of the two
    assert "after step 4 " in (tmp_path / "reward" / "README.md").read_text()


def test_the_card_says_recipe_and_numbers_and_no_path_of_this_machine(trained, tmp_path):
    run, _ = trained
    main(["export", str(run), str(tmp_path / "tiny-papo")])
    card = (tmp_path / "tiny-papo" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n")
    for line in (
        "- papo\n",
        "# tiny-papo\n",
        "The policy of model after step 4 of reinforcement learning",
        "Weights are bfloat16.",
        "| `perception_kl` | perception_kl | 0.02 |",
        "schedule.warmup_steps=7",
        "| `masked_entropy` | entropy | 0.05 | view=masked",
        "- `masked`: kind=random_patch",
        "| `algorithm.adv_estimator` | grpo |",
        "| `worker.actor.optim.lr` | 0.003 |",
        "| `data.train_files` | train.parquet |",
        "| metric | step 0 | step 4 |",
        "| `val/accuracy` | 0.25 | 0.5 |",
        "| `val/reward` | 0.3 | 0.65 |",
        'from_pretrained("tiny-papo")',
    ):
        assert line in card, line
    assert str(tmp_path.parent) not in card and "/home/" not in card and "0.99" not in card


def test_a_tied_head_is_written_once(assets, tied_model, tmp_path):
    with process_group():
        sent = train(0, assets, tied_model, tmp_path / "run")
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"])
    assert torch.equal(greedy(assets, tmp_path / "out", tmp_path), greedy(assets, tied_model, tmp_path, sent))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


def test_the_merger_takes_a_checkpoint_of_ours_and_leaves_it_whole(trained, tmp_path):
    run, sent = trained
    copied = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints" / "global_step_4"
    merge(["--local_dir", str(copied / "actor")])
    found = AutoModelForImageTextToText.from_pretrained(copied / "actor" / "huggingface")
    assert all(
        torch.equal(weight, sent[name].bfloat16().to(weight.dtype)) for name, weight in found.state_dict().items()
    )
    verify(str(copied))


def test_what_cannot_be_exported_is_named_and_leaves_nothing(trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    four, out = run / "checkpoints" / "global_step_4", tmp_path / "out"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ([str(run), str(tmp_path / "taken")], "taken' exists and is not empty"),
        ([str(tmp_path / "nowhere"), str(out)], "nowhere' is no folder"),
        ([str(tmp_path / "empty"), str(out)], "empty' holds no checkpoint"),
        ([str(four), str(out), "--best"], "--best chooses among the checkpoints of a run"),
        (
            [str(run), str(out), "--best", "val/f1"],
            "none of the steps 4, 2 .*has val/f1; measured are val/accuracy, val/r",
        ),
        ([str(run), str(out), "--dtype", "int8"], "--dtype int8"),
        ([str(run), str(out), "--merge-lora"], "--merge-lora: .* has no adapter"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{named}"):
            main(["export", *arguments])
    shard = next((four / "actor").glob("__*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=f"{shard.name} has .* bytes, and had"):
        main(["export", str(run), str(out)])
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(SystemExit, match="has no file latest"):
        main(["export", str(run), str(out)])
    assert sorted(os.listdir(tmp_path)) == ["empty", "run", "taken"] and os.listdir(tmp_path / "taken") == ["notes"]


def test_a_failed_upload_leaves_the_export(trained, tmp_path):
    with pytest.raises(SystemExit, match="the upload to 'someone/tiny' failed"):
        main(["export", str(trained[0]), str(tmp_path / "out"), "--push-to-hub", "someone/tiny"])
    assert 'from_pretrained("someone/tiny")' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.vllm
def test_vllm_says_the_same(trained, assets, tmp_path, ray_cluster):
    from tests.fakes.cluster import read_prompts, start_cluster

    main(["export", str(trained[0]), str(tmp_path / "out"), "--dtype", "fp32"])
    path = write_parquet(tmp_path / "prompts.parquet", MIXED)
    cluster = start_cluster(tmp_path / "out", path, "worker.rollout.name=vllm")
    try:
        sampling = [SamplingParams(n=1, temperature=0.0, top_p=1.0, top_k=-1, max_tokens=12, seed=0)] * len(MIXED)
        found = cluster.generate(read_prompts(cluster), sampling)
        assert torch.equal(found["responses"], greedy(assets, tmp_path / "out", tmp_path))
    finally:
        cluster.stop()
