"""Packed rows with shared prefixes against padded rows of plain transformers: the update and a pass without gradient.

    python scripts/benchmark_step.py [--n 8 --prompts 1 --response 128 --image 448 --views 2 --threads 1 --repeats 3]
    python scripts/benchmark_step.py --ahead      # whole steps: generation and training at one time

A Qwen2.5-VL of 29 million random weights answers prompts of an image and a few words; both sides see the same token ids
and the same pictures, the tower once per different picture. Prints seconds, their ratio in this run, and the share of
the matrix-product rate of the same threads that the packed update reaches.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from verl.models.attention import use_segments
from verl.models.families import family_of
from verl.models.families.base import Images, join_images
from verl.models.families.qwen_vl import GRID, PIXELS
from verl.models.log_probs import chunked_log_probs
from verl.models.onednn import use_onednn
from verl.models.packing import pack
from verl.models.policy import PolicyModel
from verl.utils.process import keep_freed_memory

VOCABULARY, IMAGE_TOKEN, MERGE, CHUNK = 1000, 999, 2, 1024
CPU = torch.device("cpu")


def build(implementation: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    text |= {"intermediate_size": 1408, "vocab_size": VOCABULARY, "rope_parameters": rope}
    text |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    vision = {"depth": 4, "hidden_size": 256, "intermediate_size": 684, "num_heads": 4, "out_hidden_size": 512}
    config: AutoConfig = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=implementation)
    return model.train()


def make_rows(options: argparse.Namespace, config: Qwen2_5_VLConfig) -> tuple[dict[str, torch.Tensor], list[Images]]:
    """Prompts x views x n rows without padding, and the images of each."""
    generator = torch.Generator().manual_seed(1)
    side = options.image // config.vision_config.patch_size // MERGE * MERGE
    patches, tokens = side * side, side * side // MERGE**2
    words = torch.randint(0, VOCABULARY - 1, (options.prompts, options.words), generator=generator)
    answers = torch.randint(0, VOCABULARY - 1, (options.prompts, options.n, options.response), generator=generator)
    ids, images = [], []
    for prompt in range(options.prompts):
        for _ in range(options.views):
            pixels = torch.randn(patches, 1176, generator=generator)
            own = Images.of([{PIXELS: pixels, GRID: torch.tensor([[1, side, side]])}])
            prefix = torch.cat([torch.full((tokens,), IMAGE_TOKEN), words[prompt]])
            ids += [torch.cat([prefix, answer]) for answer in answers[prompt]]
            images += [own] * options.n
    ids, family = torch.stack(ids), family_of(config)
    prompt_length = tokens + options.words
    starts = torch.stack(
        [family.positions(row[:prompt_length], own, config) for row, own in zip(ids, images, strict=True)]
    )
    tail = starts.amax(dim=(1, 2))[:, None] + 1 + torch.arange(options.response)
    positions = torch.cat([starts, tail[:, None].expand(-1, 3, -1)], dim=2)
    mask = torch.ones_like(ids)
    return {"ids": ids, "mask": mask, "positions": positions, "response": mask[:, prompt_length:]}, images


def packed_loss(model: PolicyModel, rows: dict[str, torch.Tensor], images: list[Images]) -> torch.Tensor:
    packed = pack(rows["ids"], rows["mask"], rows["positions"], rows["response"], images, CPU)
    return model(packed, packed.images)["log_probs"].mean()


def padded_loss(inner: Qwen2_5_VLForConditionalGeneration, rows: dict, images: list[Images]) -> torch.Tensor:
    """Rows side by side in rectangles, as plain transformers takes them."""
    family, width = family_of(inner.config), rows["response"].shape[1]
    features, _ = family.image_features(inner, *join_images(images), CPU)
    hidden = inner.model(
        input_ids=rows["ids"],
        attention_mask=rows["mask"],
        **family.forward_arguments(rows["positions"], features),
        use_cache=False,
    ).last_hidden_state[:, -width - 1 : -1]
    targets = rows["ids"][:, -width:].flatten()
    banned = torch.empty(0, dtype=torch.int64)
    return chunked_log_probs(hidden.flatten(0, 1), targets, inner.lm_head, 1.0, banned, CHUNK).mean()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of several calls, after one that does not count."""
    function()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def product_rate() -> float:
    """Float32 operations per second of a large matrix product."""
    one, other = torch.randn(2048, 1024), torch.randn(1024, 2048)
    return 2 * 2048 * 2048 * 1024 / seconds(lambda: one @ other, 5)


def peak_memory(function: Callable[[], object]) -> int:
    """MiB that a call takes at most, beside what there is before it; measured in a fork of this process."""
    own, child = os.pipe()
    if not (process := os.fork()):
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the peak begins anew
        before = memory("VmRSS")
        function()
        os.write(child, str(memory("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(process, 0)
    os.close(child)
    with os.fdopen(own) as file:
        return int(file.read())


def memory(field: str) -> int:
    """MiB of this process, as the kernel counts them."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) // 1024


def operations(run: Callable[[], object]) -> int:
    """Floating point operations of a call, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    def of_linear(rows: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
        return 2 * math.prod(rows) * out_shape[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: of_linear}) as counter:
        run()
    return counter.get_total_flops()


def ahead() -> dict[str, float]:
    """A step with trainer.ahead=1 on two cores, one for the engine and one for the only rank, against generation and
    the rest of a step one after the other on one core."""
    from benchmark_run import HERE, make_inputs, run

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("--ahead needs two cores")
    options = argparse.Namespace(engine="hf", ranks=1, overrides=["algorithm.terms.policy.tis=token"])
    options.overrides += ["worker.rollout.cpu_threads=1", "trainer.max_steps=6"]
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(Path(scratch))
        alone = run(HERE, Path(scratch), "papo, stored view", options, {cores[0]})
        options.overrides.append("trainer.ahead=1")
        both = run(HERE, Path(scratch), "papo, stored view", options, set(cores[:2]))
    generation, step = alone["timing_s/rollout"], both["timing_s/step"]
    rest = alone["timing_s/step"] - generation
    found = {"ratio": step / max(generation, rest), "faster": alone["timing_s/step"] / step}
    sys.stdout.write(
        f"one after the other: generation {generation:.2f} s, the rest {rest:.2f} s; one step ahead {step:.2f} s:\n"
        f"{found['ratio']:.2f} of the longer one, {found['faster']:.2f} times faster (engine idle "
        f"{both['perf/idle_engine_frac']:.0%}, trainer idle {both['perf/idle_trainer_frac']:.0%})\n"
    )
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("n", 8), ("prompts", 1), ("response", 128), ("image", 448), ("words", 19), ("views", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ahead", action="store_true", help="whole steps with trainer.ahead=1 instead")
    options = parser.parse_args(arguments)
    if options.ahead:
        return ahead()
    torch.set_num_threads(1)  # threads that have begun would be missing from the forks of peak_memory
    plain, inner = build(), build()
    use_segments(inner)
    use_onednn(inner)
    policy = PolicyModel(inner, [], 1.0, CHUNK)
    rows, images = make_rows(options, plain.config)

    def update(loss: Callable[..., torch.Tensor], model: torch.nn.Module) -> float:
        model.zero_grad()
        value = loss(model, rows, images)
        value.backward()
        return value.item()

    with torch.no_grad():
        difference = abs(packed_loss(policy, rows, images).item() - padded_loss(plain, rows, images).item())
    times = {
        "update": (lambda: update(padded_loss, plain), lambda: update(packed_loss, policy)),
        "pass": (
            torch.no_grad()(lambda: padded_loss(plain, rows, images)),
            torch.no_grad()(lambda: packed_loss(policy, rows, images)),
        ),
    }
    found: dict[str, float] = {"difference": difference}
    slow, fast = (peak_memory(run) for run in times["update"])
    found["memory"] = fast / slow
    sys.stdout.write(f"memory   padded {slow} MiB, packed {fast} MiB: {fast / slow:.2f} of it, gradients included\n")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    for name, (padded, packed) in times.items():
        slow, fast = seconds(padded, options.repeats), seconds(packed, options.repeats)
        found[name] = slow / fast
        sys.stdout.write(f"{name:8} padded {slow:.2f} s, packed {fast:.2f} s: {slow / fast:.2f} times faster\n")
        if name == "update":
            rate = operations(times["update"][1]) / fast
            found["share"] = rate / product_rate()
            sys.stdout.write(f"         {rate / 1e9:.0f} GFLOP/s, {found['share']:.0%} of the matrix-product rate\n")
    sys.stdout.write(f"mean log-probs differ by {difference:.1e}\n")
    return found


if __name__ == "__main__":
    main()
