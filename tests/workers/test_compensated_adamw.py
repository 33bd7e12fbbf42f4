"""AdamW in bfloat16, against torch's AdamW in float32 and float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from tests.fakes.actors import on_ranks
from verl.config.compose import compose_config
from verl.config.option import check_options
from verl.config.worker import OptimConfig, OptimStrategy
from verl.workers.training.compensated_adamw import CompensatedAdamW
from verl.workers.training.guarded_step import GuardedStep
from verl.workers.training.optim import build_optimizer, weight_dtype

BF16 = OptimConfig(strategy=OptimStrategy.adamw_bf16, lr=1e-6, weight_decay=0.01)


def gradients(steps: int, size: int = 4096) -> list[torch.Tensor]:
    """Noise around a direction of each weight's own, of sizes as they occur, all numbers of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(size, generator=generator) * 1e-3
    return [(drift + torch.randn(size, generator=generator) * 1e-3).bfloat16() for _ in range(steps)]


def start(size: int = 4096) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()


def run(make, dtype: torch.dtype, given: list[torch.Tensor]) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A weight vector after one step for each of the gradients."""
    weight = torch.nn.Parameter(start().to(dtype))
    optimizer = make([weight])
    for gradient in given:
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight, optimizer


def torch_adamw(parameters):
    return build_optimizer(parameters, OptimConfig(lr=BF16.lr, weight_decay=BF16.weight_decay))


def ours(parameters):
    return build_optimizer(parameters, BF16)


def test_in_float32_it_is_adamw():
    config = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    given = gradients(60)
    found, _ = run(lambda p: CompensatedAdamW(p, **config), torch.float32, given)
    expected, _ = run(lambda p: torch.optim.AdamW(p, **config), torch.float32, given)
    assert (expected - start()).abs().mean() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_tiny_updates_add_up_where_bfloat16_alone_stands_still():
    given = gradients(600)
    exact, _ = run(torch_adamw, torch.float64, given)
    plain, _ = run(torch_adamw, torch.bfloat16, given)
    weight, optimizer = run(ours, torch.bfloat16, given)
    compensation = optimizer.state[weight]["compensation"]
    trained = weight.double() + compensation.double()
    moved = exact - start().double()
    assert moved.abs().mean() > 2e-4
    wide = start().abs() > 0.008  # half of a step of bfloat16 is here more than 10 updates
    assert wide.float().mean() > 0.5 and torch.equal(plain[wide], start()[wide])
    assert weight.dtype == compensation.dtype == torch.bfloat16
    error = (trained - exact).abs()
    assert error.mean() < 0.02 * moved.abs().mean() and error.max() < 0.1 * moved.abs().max()
    # What the forward sees is that weight, rounded.
    assert ((weight.double() - trained).abs() <= start().abs() * 2**-7 + 1e-4).all()


def test_the_second_moment_follows_gradients_that_shrink():
    given = [g * 10 for g in gradients(100)] + gradients(2000)
    exact, reference = run(torch_adamw, torch.float64, given)
    weight, optimizer = run(ours, torch.bfloat16, given)
    _, plain = run(torch_adamw, torch.bfloat16, given)
    expected = reference.state[exact]["exp_avg_sq"].mean()
    assert optimizer.state[weight]["exp_avg_sq"].double().mean() == pytest.approx(expected.item(), rel=0.01)
    (stuck,) = (state["exp_avg_sq"].double().mean() for state in plain.state.values())
    assert stuck > 3 * expected


def test_a_resumed_run_repeats_the_draws():
    given = gradients(20)
    straight, _ = run(ours, torch.bfloat16, given)
    half, optimizer = run(ours, torch.bfloat16, given[:10])
    torch.manual_seed(7)
    again = torch.nn.Parameter(half.detach().clone())
    resumed = ours([again])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in given[10:]:
        again.grad = gradient
        resumed.step()
    assert torch.equal(again, straight) and set(optimizer.state[half]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "compensation",
    }


def sharded(rank: int) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """(float32 weight after two steps on a shard each, bfloat16 state gathered after saving and loading, its names)."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = fully_shard(torch.nn.Linear(8, 8, bias=False).to(dtype))
        optimizer = CompensatedAdamW(layer.parameters(), 1e-2, (0.9, 0.999), 1e-8, 0.01)
        for seed in range(2):
            torch.manual_seed(seed)
            layer(torch.randn(4, 8, dtype=dtype)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((layer, optimizer))
    (exact, _), (layer, optimizer) = found
    saved = get_optimizer_state_dict(layer, optimizer)
    fresh = CompensatedAdamW(layer.parameters(), 1e-2, (0.9, 0.999), 1e-8, 0.01)
    set_optimizer_state_dict(layer, fresh, saved)
    state = fresh.state[layer.weight]
    assert state["step"] == 2 and torch.equal(state["exp_avg"].full_tensor(), saved_average(optimizer, layer))
    return exact.weight.full_tensor().detach(), state["compensation"].full_tensor(), set(state)


def saved_average(optimizer: torch.optim.Optimizer, layer: torch.nn.Module) -> torch.Tensor:
    return optimizer.state[layer.weight]["exp_avg"].full_tensor()


def test_shards_are_updated_as_the_whole_and_their_states_are_saved_by_name():
    one, two = on_ranks(1, sharded)[0], on_ranks(2, sharded)[0]
    torch.testing.assert_close(one[0], two[0], atol=1e-7, rtol=0)
    assert one[2] == {"step", "exp_avg", "exp_avg_sq", "compensation"} and one[1].shape == (8, 8)


def test_the_strategy_says_what_weights_are_kept_in_and_refuses_float32_compute():
    assert weight_dtype(BF16) == torch.bfloat16 and weight_dtype(OptimConfig()) == torch.float32
    options = ["worker.actor.model.model_path=x", "data.train_files=a", "data.val_files=b"]
    for role in ("actor", "critic"):
        strategy = f"worker.{role}.optim.strategy=adamw_bf16"
        check_options(compose_config("grpo", [*options, strategy]))
        with pytest.raises(ValueError, match=f"worker.{role}.optim.strategy=adamw_bf16 keeps weights in bfloat16"):
            check_options(compose_config("grpo", [*options, strategy, f"worker.{role}.fsdp.compute_dtype=float32"]))


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = build_optimizer([*layer.parameters()], replace(BF16, lr=0.1))
    step = GuardedStep("actor", layer, optimizer, None, 1.0, 3, torch.device("cpu"))
    inputs = [256.0] + [1.0] * 40  # behind 256, bfloat16 has steps of 2
    for value in inputs:
        layer(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
        step.widen_gradients()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.item() == sum(inputs)
    before = layer.weight.item()
    optimizer.step()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.item() != before
