"""Times whole steps of runs side by side: GRPO, PAPO with a stored and with a live masked view, and other commits.

    python scripts/benchmark_run.py [--engine hf] [--tree ../before ...] [--ranks 1] [hydra overrides]

The model is the Qwen2.5-VL of 29 million random weights of benchmark_step.py; a step has 4 prompts of 275 tokens, most
of them an image, with 8 responses of exactly 128 tokens, one update, and a reference model. `--tree` names the root of
another checkout, which runs the same model and data. All variants are timed in this run; compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from benchmark_step import build
from PIL import Image
from transformers import AutoProcessor

from papo.quickstart.tiny_vlm import build_model

HERE = Path(__file__).resolve().parent.parent
VARIANTS = {
    "grpo": ("grpo", []),
    "papo, stored view": ("papo_grpo", ["algorithm.views.masked.grad=false"]),
    "papo, live view": ("papo_grpo", ["algorithm.views.masked.grad=true"]),
}
STEPS, WARM_UP, SIDE, PROMPTS, RESPONSES, LENGTH = 4, 1, 448, 4, 8, 128


def make_inputs(folder: Path) -> None:
    """A model and its data in `folder`."""
    words = [f"{word} {number}" for word in ("Describe", "the", "picture", "in", "detail") for number in range(100)]
    build_model(folder / "small", words)
    processor = AutoProcessor.from_pretrained(folder / "small")
    processor.image_processor.size["longest_edge"] = SIDE * SIDE
    model, tokenizer = build(), processor.tokenizer
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{name.removesuffix('_pad')}_token_id"
        setattr(model.config, key, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    model.config.text_config.eos_token_id = tokenizer.eos_token_id
    model.config.text_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(PROMPTS * STEPS)]
    rows = {"problem": ["<image>Describe it."] * len(images), "answer": ["7"] * len(images)}
    features = datasets.Features(
        {"problem": datasets.Value("string"), "answer": datasets.Value("string"), "images": [datasets.Image()]}
    )
    data = datasets.Dataset.from_dict(rows | {"images": [[image] for image in images]}, features=features)
    data.to_parquet(folder / "train.parquet")
    (folder / "reward.py").write_text(
        "REWARD_TYPE = 'sequential'\n\ndef score(one):\n"
        "    return {'overall': float(hash(one['response']) % 2), 'accuracy': 0.0, 'format': 0.0}\n"
    )


def run(
    tree: Path, folder: Path, name: str, options: argparse.Namespace, cores: set[int] | None = None
) -> dict[str, float]:
    """Medians of a variant's metrics over the steps behind the first; `cores` are those that it may use."""
    preset, overrides = VARIANTS[name]
    out = folder / "out" / f"{tree.name}-{name.replace(', ', '-').replace(' ', '-')}"
    given = [
        f"data.train_files={folder / 'train.parquet'}",
        *(
            "data.val_files=null",
            "data.format_prompt=null",
            "data.max_prompt_length=300",
            f"data.max_response_length={LENGTH}",
        ),
        *(f"data.rollout_batch_size={PROMPTS}", "data.num_workers=0", f"data.max_pixels={SIDE * SIDE}"),
        f"worker.actor.model.model_path={folder / 'model'}",
        f"worker.actor.global_batch_size={PROMPTS}",
        *("worker.actor.model.enable_gradient_checkpointing=false", "worker.actor.fsdp.min_block_params=1000000000"),
        *(f"worker.rollout.n={RESPONSES}", f"worker.rollout.name={options.engine}", "worker.rollout.ignore_eos=true"),
        *(f"worker.reward.reward_function={folder / 'reward.py'}:score", "worker.reward.reward_function_kwargs={}"),
        *("trainer.device=cpu", f"trainer.n_gpus_per_node={options.ranks}", f"trainer.max_steps={STEPS}"),
        *("trainer.val_before_train=false", "trainer.val_after_train=false", "trainer.val_freq=0"),
        *("trainer.save_freq=0", "trainer.save_model=false", "trainer.resume=never", f"trainer.output_dir={out}"),
    ]
    if tree == HERE:  # older trees do not know the one key, and overrule the other on a CPU
        given.append("worker.actor.max_tokens_per_micro_batch=4096")  # a prompt's activations fit the cores' caches
        if options.engine == "vllm":
            given.append("worker.rollout.enforce_eager=false")
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "verl.trainer.main", "--config-name", preset, *given, *overrides]
    done = subprocess.run(
        [*command, *options.overrides],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=None if cores is None else partial(os.sched_setaffinity, 0, cores),
    )
    if done.returncode:
        raise RuntimeError(f"{name} in {tree} failed:\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing_s/step" in line][WARM_UP:]
    return {
        key: statistics.median(line[key] for line in steps if key in line)
        for key in steps[0]
        if isinstance(steps[0][key], (int, float))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--variants", default=",".join(v.replace(", ", "+") for v in VARIANTS))
    parser.add_argument("--tree", type=Path, action="append", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    chosen = [name.replace("+", ", ") for name in options.variants.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder)
        first = None
        for name in chosen:
            for tree in (HERE, *(path.resolve() for path in options.tree)):
                found = run(tree, folder, name, options)
                step = found["timing_s/step"]
                first = first or step
                phases = {k[9:]: v for k, v in found.items() if k.startswith("timing_s/") and v > 0.01 * step}
                del phases["step"]
                parts = ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
                sys.stdout.write(f"{name:18} {tree.name:12} {step:6.2f} s, {step / first:.2f} of the first ({parts})\n")
                if "perf/tokens_computed" in found:
                    extra = found["perf/tokens_computed"] / found["perf/tokens_useful"]
                    ray_mb = found["perf/ray_mb"]
                    sys.stdout.write(f"{'':31} {extra:.3f} computed per useful token, {ray_mb:.1f} MB through Ray\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
