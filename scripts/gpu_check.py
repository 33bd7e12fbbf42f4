"""Checks of what only a GPU can show: numerics, speed and memory of the trainer here, in at most eight minutes.

    pip install --no-deps -e . && pip install hydra-core omegaconf     # beside torch >= 2.11 and transformers
    python scripts/gpu_check.py [--out gpu_check.json] [--only update,ipc]
    python scripts/gpu_check.py --cpu                                  # the same checks, small, as far as a CPU goes

Prints a line per check and writes them as JSON. With a second GPU it also trains on two ranks; where Ray and vLLM are
installed, and not with --cpu, it runs three steps of the quickstart with vLLM on the trainer's GPU. No network, no
downloaded weights. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from gpu_lab import CPU, REAL, SMALL, Lab, compose, lengths_of, make_actor, make_policy, make_rows, start, whole
from transformers import Qwen2_5_VLConfig

from papo.tools.doctor.case import GIB, GPU, Case
from papo.tools.doctor.memory import models_of, total
from papo.tools.doctor.shape import shape_of
from verl.algorithms.losses.compose import coefficients
from verl.checkpoint.tensors import MODEL
from verl.columns import ORIGINAL
from verl.config.config import Config
from verl.metrics.machine import peak_flops
from verl.models.attention import segment_attention, window_attention
from verl.models.forward import forward_views, model_inputs
from verl.protocol import DataProto
from verl.utils.files import atomic_path
from verl.workers.fsdp.checkpoint import StateWriter, load_state, model_tensors, optimizer_tensors, plain_state
from verl.workers.fsdp.parking import Parking
from verl.workers.fsdp.wrap import mesh_of, shard
from verl.workers.rollout.weight_sync import IPCCarrier, plan_buckets
from verl.workers.training.dp_actor import compute_log_probs

REPOSITORY = Path(__file__).resolve().parents[1]
NARROW = "worker.actor.optim.strategy=adamw_bf16"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| over |wanted|."""
    assert torch.isfinite(found).all(), "a value is not finite"
    return ((found - wanted).norm() / wanted.norm()).item()


def check_log_probs(lab: Lab) -> dict[str, float]:
    """bfloat16 log-probs and gradients of packed rows against float32, lengths through all residues modulo 128"""
    lengths = [*range(1, 129)]
    rows = make_rows(SMALL, [(4, 5 + 17 * i, lengths[i::8]) for i in range(8)])
    precise = make_policy(SMALL, CPU, torch.float32, checkpointing=False)
    narrow = copy.deepcopy(precise).to(lab.device)
    fsdp = compose("grpo", 128, "worker.actor.fsdp.compute_dtype=bfloat16").worker.actor.fsdp
    shard(narrow, mesh_of(lab.device, None), fsdp)
    mask, found = rows["response_mask"], []
    for policy, device in ((precise, CPU), (narrow, lab.device)):
        log_probs = forward_views(policy, rows, [ORIGINAL], device)["log_probs"]
        (log_probs * rows["advantages"].to(device)).sum().backward()
        gradients = torch.cat([whole(p.grad).flatten() for p in policy.parameters() if p.grad is not None])
        found.append((log_probs.detach().float().cpu()[mask.bool()], gradients))
    (wanted, gradient), (got, narrow_gradient) = found
    error = (got - wanted).abs().max().item()
    apart = relative(narrow_gradient, gradient)
    assert error < 0.1 and apart < 0.1, f"log-probs differ by {error:.3g} nats, gradients by {apart:.1%}"
    return {"largest_difference_nats": error, "gradient_difference": apart, "rows": len(rows)}


def check_attention(lab: Lab) -> dict[str, float]:
    """Attention by segments, and of the vision tower's windows, against SDPA of each segment, gradients too"""
    dtype, bound = (torch.bfloat16, 2e-2) if lab.full else (torch.float32, 1e-4)
    rows = make_rows(SMALL, [(2, 9, [1, 40, 7]), (3, 30, [64, 129]), (2, 50, [3])])
    packed = model_inputs(rows, lab.device)["packed"]
    part = packed.segments
    pieces = [
        (slice(*queries), part.keys[slice(*keys)])
        for queries, keys in zip(pairwise(part.query_ends.tolist()), pairwise(part.key_ends.tolist()), strict=True)
    ]
    worst = {"text": _attention(lab, segment_attention, {"segments": part}, pieces, (4, 2, 128), True, dtype)}
    cut = torch.tensor([0, 64, 128, 176, 192, 255], dtype=torch.int32, device=lab.device)
    windows = [(slice(a, b), torch.arange(a, b, device=lab.device)) for a, b in pairwise(cut.tolist())]
    names = {"cu_seq_lens_q": cut, "max_length_q": 79}
    worst["tower"] = _attention(lab, window_attention, names, windows, (2, 2, 80), False, dtype)
    for name, value in worst.items():
        assert value < bound, f"{name}: values or gradients differ by {value:.2%}"
    return {f"{name}_difference": value for name, value in worst.items()}


def _attention(
    lab: Lab,
    function: Callable,
    names: dict,
    pieces: list,
    shape: tuple[int, int, int],
    causal: bool,
    dtype: torch.dtype,
) -> float:
    """The largest relative difference of output and gradients between `function` and SDPA in float32 by piece."""
    heads, kv_heads, width = shape
    count = pieces[-1][0].stop
    torch.manual_seed(0)
    counts = (heads, kv_heads, kv_heads)
    inputs = [torch.randn(1, n, count, width).to(lab.device, dtype).requires_grad_() for n in counts]
    upstream = torch.randn(1, count, heads, width).to(lab.device, dtype)
    out, _ = function(torch.nn.Module(), *inputs, None, scaling=width**-0.5, **names)
    gradients = torch.autograd.grad(out, inputs, upstream)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    query, key, value = (tensor[0].repeat_interleave(heads // tensor.shape[1], dim=0) for tensor in exact)
    parts = []
    for queries, keys in pieces:
        q, k, v = query[:, queries], key[:, keys], value[:, keys]
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=lab.device)
        mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5))
    wanted = torch.cat(parts, dim=1).transpose(0, 1)[None]
    wanted_gradients = torch.autograd.grad(wanted, exact, upstream.float())
    pairs = zip((out, *gradients), (wanted, *wanted_gradients), strict=True)
    return max(relative(found.float(), right) for found, right in pairs)


def check_update(lab: Lab) -> dict[str, float]:
    """A policy update of Qwen2.5-VL-3B's shape with paper-like lengths: speed, memory, PAPO against GRPO"""
    model, side, words, count, n, mean = (REAL, 24, 80, 24, 5, 480.0) if lab.full else (SMALL, 4, 10, 3, 4, 20.0)
    longest = 2048 if lab.full else 60
    lengths = lengths_of(count * n, mean, longest)
    rows = make_rows(model, [(side, words, lengths[i * n : (i + 1) * n]) for i in range(count)])
    found: dict[str, float] = {}
    for name, preset in (("grpo", "grpo"), ("papo", "papo_grpo")):
        own, config, estimate = _that_fits(lab, model, preset, longest)
        found["layers"] = own.text_config.num_hidden_layers
        found |= {f"{name}_{key}": value for key, value in _step(lab, own, rows, config, estimate).items()}
        lab.allocated()  # gives the memory back
    found["papo_over_grpo"] = found["papo_seconds"] / found["grpo_seconds"]
    for name in ("grpo", "papo"):
        if estimate := found.get(f"{name}_estimate_gib"):
            peak = found[f"{name}_peak_gib"]
            assert peak <= 1.1 * estimate, f"{name}: peak memory {peak:.1f} GiB, estimate {estimate:.1f} GiB"
    return found


def _step(lab: Lab, model: Qwen2_5_VLConfig, rows: DataProto, config: Config, estimate: int) -> dict[str, float]:
    """Passes and update of one step, after one that does not count."""
    actor, found, metrics = make_actor(lab, model, config), {}, {}
    coefs = coefficients(actor.terms, 1, 2)
    needs, budget = actor.requirements, config.worker.actor.max_tokens_per_micro_batch
    passes = [ORIGINAL] * needs.old_pass + list(needs.stored_views)

    def step() -> None:
        made = compute_log_probs(actor.policy, rows, passes, budget, lab.device) if passes else {}
        columns = rows.with_columns({{"log_probs": "old_log_probs"}.get(name, name): c for name, c in made.items()})
        update = partial(actor.update_policy, columns, [len(rows)], coefs)
        found["update_seconds"] = lab.seconds(lambda: metrics.update(update().result()))

    step()
    if lab.full:
        torch.cuda.reset_peak_memory_stats(lab.device)
    found["seconds"] = lab.seconds(step)
    assert math.isfinite(metrics["actor/grad_norm"]), "the gradient is not finite"
    found["tokens_per_second"] = metrics["perf/tokens_computed"] / found["update_seconds"]
    if lab.full:
        found["peak_gib"] = torch.cuda.max_memory_allocated(lab.device) / GIB
        found["estimate_gib"] = estimate / GIB
        if peak := peak_flops(torch.cuda.get_device_name(lab.device), None):
            found["mfu"] = actor.operations(rows) / found["update_seconds"] / peak
    return found


def _that_fits(lab: Lab, model: Qwen2_5_VLConfig, preset: str, longest: int) -> tuple[Qwen2_5_VLConfig, Config, int]:
    """The model, with fewer layers where this GPU cannot hold its update, the config, and the doctor's estimate."""
    memory = torch.cuda.get_device_properties(lab.device).total_memory if lab.full else 2**50
    for share in (1, 2, 4, 8):
        cut = copy.deepcopy(model)
        text, tower = cut.text_config, cut.vision_config
        text.num_hidden_layers, tower.depth = text.num_hidden_layers // share, tower.depth // share
        text.layer_types = text.layer_types[: text.num_hidden_layers]
        for overrides in ((), (NARROW,), (NARROW, "worker.actor.max_tokens_per_micro_batch=4096")):
            config = compose(preset, longest, *overrides)
            estimate = _estimate(cut, config, memory)
            if estimate < 0.9 * memory:
                return cut, config, estimate
    raise ValueError(f"{memory / GIB:.0f} GiB hold no update of this kind")


def _estimate(model: Qwen2_5_VLConfig, config: Config, memory: int) -> int:
    """Bytes of the actor in its update, by the doctor."""
    shape = shape_of(model)
    case = Case([GPU("this", memory, memory)], imagined=True, config=config)
    actor = models_of(case, config, dict.fromkeys(("actor", "reference", "critic"), shape), 1)["actor"]
    return total([*actor.states, *actor.gradients]) + max(total(actor.work), total(actor.step))


def check_checkpoint(lab: Lab) -> dict[str, float]:
    """FSDP2 with adamw_bf16 on this process group: a checkpoint is read back bit for bit, and training goes on"""
    config = compose("papo_grpo", 60, NARROW)
    rows = make_rows(SMALL, [(3, 12, [20, 31, 7, 60]), (2, 40, [5, 9, 33, 50])])
    first, second = (make_actor(lab, SMALL, config) for _ in range(2))
    coefs = coefficients(first.terms, 1, 2)
    for _ in range(2):
        first.update_policy(rows, [len(rows)], coefs)
    with tempfile.TemporaryDirectory() as folder:
        writer = StateWriter()
        tensors = model_tensors(first.policy) | optimizer_tensors(first.step)
        seconds = lab.seconds(lambda: writer.start(folder, tensors, plain_state(first.step), None, False))
        writer.finish()
        load_state(folder, second.step, dist.get_rank())
    loaded = model_tensors(second.policy) | optimizer_tensors(second.step)
    for name, tensor in tensors.items():
        assert torch.equal(whole(tensor), whole(loaded[name])), f"{name} is not as it was saved"
    norms = [a.update_policy(rows, [len(rows)], coefs).result()["actor/grad_norm"] for a in (first, second)]
    assert math.isclose(*norms, rel_tol=1e-2), f"gradient norms {norms} after the checkpoint"
    assert all(w.dtype == torch.bfloat16 for name, w in loaded.items() if name.startswith(MODEL))
    return {"seconds": seconds, "tensors": len(tensors)}


def check_ipc(lab: Lab) -> dict[str, float]:
    """Weights handed to another process on this device: speed, and nothing left allocated"""
    before, size, count = lab.allocated(), (GIB if lab.full else 2**25), 4
    shapes = [(f"weight{i}", torch.bfloat16, (size // 4096, 2048)) for i in range(count)]
    carrier = IPCCarrier(lab.device)
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs, str(lab.device)), daemon=True)
    receiver.start()
    seconds = 0.0
    for number, layout in enumerate(plan_buckets(shapes, size)):
        data = layout.empty(lab.device)
        layout.pack([torch.full(layout.entries[0].shape, float(number), device=lab.device)], data)
        ours.send((layout, carrier.send(data)))
        assert ours.poll(120), "the other process does not answer"
        mean, taken = ours.recv()
        assert mean == number, f"bucket {number} arrived as {mean}"
        seconds += taken if number else 0.0  # the first one starts things
    ours.send(None)
    receiver.join(60)
    del data
    carrier.release()
    left = lab.allocated() - before
    assert left == 0, f"{left} bytes stay allocated"
    return {"gb_per_second": (count - 1) * size / seconds / 1e9}


def _receive(pipe: Any, device: str) -> None:
    """The engine's side: open each bucket, copy it, and say its mean and the seconds."""
    lab = Lab(torch.device(device))
    carrier = IPCCarrier(lab.device)
    while (message := pipe.recv()) is not None:
        layout, payload = message
        copies: list[torch.Tensor] = []

        def load(layout: Any = layout, payload: Any = payload, copies: list = copies) -> None:
            copies.extend(weight.clone() for _, weight in layout.unpack(carrier.receive(layout, [payload])))

        taken = lab.seconds(load)
        pipe.send((copies[0].float().mean().item(), taken))


def check_parking(lab: Lab) -> dict[str, float]:
    """States parked in main memory and taken back: speed, memory that is freed, the same values after it"""
    before, parts, size = lab.allocated(), 16, (GIB // 4 if lab.full else 2**21)
    states = [torch.full((size // 4,), float(i), device=lab.device) for i in range(parts)]
    held, parking = lab.allocated(), Parking()
    parking.park(states)  # makes the copies in main memory
    parking.take_back()
    out = lab.seconds(lambda: parking.park(states))
    freed = held - lab.allocated()
    assert all(state.untyped_storage().nbytes() == 0 for state in states)
    assert not lab.full or freed == held - before, f"{held - before} bytes were held and {freed} freed"
    back = lab.seconds(parking.take_back)
    assert all((state == i).all() for i, state in enumerate(states)), "a state is not what it was"
    moved = parts * size
    return {"out_gb_per_second": moved / out / 1e9, "back_gb_per_second": moved / back / 1e9, "freed_gib": freed / GIB}


def check_two_ranks(lab: Lab) -> dict[str, float]:
    """The update on two ranks takes the step that it takes on one"""
    with tempfile.TemporaryDirectory() as folder:
        norms = []
        for world in (1, 2):
            store = os.path.join(folder, f"store{world}")
            torch.multiprocessing.spawn(_rank, (world, store, lab.device.type, folder), nprocs=world)
            norms.append(json.loads(Path(folder, f"norm{world}.json").read_text()))
    assert math.isclose(*norms, rel_tol=2e-2 if lab.full else 1e-4), f"gradient norms {norms}"
    return {"one_rank_norm": norms[0], "two_ranks_norm": norms[1]}


def _rank(rank: int, world: int, store: str, kind: str, folder: str) -> None:
    lab = start(torch.device(kind, rank) if kind == "cuda" else CPU, rank, world, dist.FileStore(store, world))
    rows = make_rows(SMALL, [(3, 12, [20, 31]), (2, 40, [5, 50]), (2, 7, [9, 12]), (4, 3, [60, 1])]).chunk(world)[rank]
    actor = make_actor(lab, SMALL, compose("papo_grpo", 60))
    metrics = actor.update_policy(rows, [len(rows)], coefficients(actor.terms, 1, 2)).result()
    if rank == 0:
        Path(folder, f"norm{world}.json").write_text(json.dumps(metrics["actor/grad_norm"]))
    dist.destroy_process_group()


def check_quickstart(lab: Lab) -> dict[str, float]:
    """Three steps of the quickstart with vLLM asleep on the trainer's GPU between generations"""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["trainer.max_steps=3", "trainer.n_gpus_per_node=1", "trainer.val_freq=0", "trainer.logger=[jsonl]"]
        settings += ["worker.rollout.name=vllm", "worker.rollout.gpu_memory_utilization=0.3"]
        settings += [f"trainer.output_dir={folder}/run"]
        commands = [
            [sys.executable, "-m", "papo.quickstart", "outputs/quickstart_assets"],
            [sys.executable, "-m", "verl.trainer.main", "--config-name", "quickstart", *settings],
        ]
        for command in commands:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        steps = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    kls = [step["rollout/mismatch_kl"] for step in steps if "rollout/mismatch_kl" in step]
    assert len(kls) == 3 and max(kls) < 0.02, f"rollout/mismatch_kl {kls}"
    return {"mismatch_kl": max(kls), "step_seconds": steps[-1]["timing_s/step"]}


CHECKS: dict[str, Callable[[Lab], dict[str, float]]] = {
    "log_probs": check_log_probs,
    "attention": check_attention,
    "update": check_update,
    "checkpoint": check_checkpoint,
    "ipc": check_ipc,
    "parking": check_parking,
    "two_ranks": check_two_ranks,
    "quickstart": check_quickstart,
}


def why_not(name: str, lab: Lab) -> str:
    """The reason why a check does not run here; empty if it does."""
    if name == "two_ranks" and lab.full and torch.cuda.device_count() < 2:
        return "needs a second GPU"
    if name == "quickstart" and not lab.full:
        return "scripts/quickstart.sh runs it on a CPU"
    missing = [module for module in ("ray", "vllm") if importlib.util.find_spec(module) is None]
    return f"needs {' and '.join(missing)}" if name == "quickstart" and missing else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--only", help=f"some of {','.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CHECKS)
    if unknown := set(names) - CHECKS.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: the checks are {', '.join(CHECKS)}")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --cpu runs what a CPU can show")
    logging.basicConfig(level=logging.ERROR)
    lab = start(CPU if options.cpu else torch.device("cuda", 0), 0, 1, dist.HashStore())
    about = {"device": torch.cuda.get_device_name() if lab.full else "CPU", "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "date": f"{datetime.now():%Y-%m-%d}"}
    sys.stdout.write(" | ".join(about.values()) + "\n")
    results = [run(name, lab) for name in names]
    dist.destroy_process_group()
    with atomic_path(str(options.out)) as temporary:
        Path(temporary).write_text(json.dumps({**about, "checks": results}, indent=1) + "\n")
    sys.exit(any(result["outcome"] == "fail" for result in results))


def run(name: str, lab: Lab) -> dict[str, Any]:
    """Run a check and print its line."""
    found: dict[str, Any] = {"check": name, "outcome": "pass", "what": CHECKS[name].__doc__}
    began = time.perf_counter()
    if reason := why_not(name, lab):
        found |= {"outcome": "not run", "reason": reason}
    else:
        try:
            found["numbers"] = CHECKS[name](lab)
        except Exception as error:  # whatever it is, the other checks have something to say too
            found |= {"outcome": "fail", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    found["seconds"] = time.perf_counter() - began
    text = ", ".join(f"{key} {value:.3g}" for key, value in found.get("numbers", {}).items()) or found.get("reason", "")
    sys.stdout.write(f"{found['outcome']:7}  {name:10} {found['seconds']:5.0f} s  {text}\n")
    sys.stdout.flush()
    return found


if __name__ == "__main__":
    main()
