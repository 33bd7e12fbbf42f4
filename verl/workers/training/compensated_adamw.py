"""AdamW for weights in bfloat16: 12 bytes a weight, its gradient in float32 included, in place of 16."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import DTensor

SIGNIFICAND_BITS = 16  # that float32 has and bfloat16 has not


class CompensatedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2) whose states have the dtype of the weights.

    A bfloat16 weight of 0.02 has steps of 1e-4, so an update of 1e-6 would vanish. `compensation` keeps what a weight
    could not take (Kahan summation): weight + compensation is the weight that is trained.

    States are rounded up or down at random, with the odds that keep their mean. Rounded to the nearest, exp_avg_sq
    could never fall: beta2 = 0.999 takes off a thousandth of it, and half a step of bfloat16 is more. The draws follow
    from the number of the update alone, so that a resumed run repeats them.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Of a sharded one each rank updates its own shard."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, index)
        return loss

    def _update(self, parameter: torch.nn.Parameter, group: dict, index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq", "compensation"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        weight, gradient = _local(parameter), _local(parameter.grad).float()
        first, second, compensation = (_local(state[name]) for name in ("exp_avg", "exp_avg_sq", "compensation"))
        beta1, beta2 = group["betas"]

        mean = first.float().lerp_(gradient, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        change = compensation.float().sub_(weight, alpha=group["lr"] * group["weight_decay"])
        change.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**step))
        before = weight.to(torch.float32, copy=True)
        weight.copy_(before + change)

        generator = torch.Generator(weight.device).manual_seed(step * 2**20 + index)
        _store(first, mean, generator)
        _store(second, square, generator)
        _store(compensation, change.sub_(weight.float() - before), generator)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _store(target: torch.Tensor, value: torch.Tensor, generator: torch.Generator) -> None:
    """Write float32 values, rounded at random where `target` is bfloat16."""
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    bits = value.view(torch.int32)
    noise = torch.randint(2**SIGNIFICAND_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    target.copy_((bits + noise).bitwise_and_(-(2**SIGNIFICAND_BITS)).view(torch.float32))
