"""Large linear layers on a CPU by oneDNN in place of torch's own product.

Both agree up to rounding. In training oneDNN's product was measured an eighth faster, on an AMD processor with AVX-512.
In decoding torch's own puts the weights in the order in which it reads them at every call, which for the few dozen rows
of a step is a third of the time; layers for decoding keep them in oneDNN's order. The operators are those of
torch.compile; torch has no public name for them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LARGE = 2**17  # weights of a layer; a product with fewer takes no longer than the call of the other operator


def is_supported() -> bool:
    """Whether torch has oneDNN and the CPU is one of x86; others have not been tried."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def use_onednn(model: nn.Module) -> None:
    """Compute the large linear layers of `model`, whose forward is in float32 on a CPU, by oneDNN, where supported."""
    for layer in model.modules() if is_supported() else ():
        if type(layer) is nn.Linear and layer.weight.numel() >= LARGE:
            layer.__class__ = TrainedLinear


class TrainedLinear(nn.Linear):
    """An nn.Linear by oneDNN."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(rows, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, _in_order(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if of_rows else None,
            flat.t() @ rows.reshape(-1, rows.shape[-1]) if of_weight else None,  # oneDNN is no faster here
            flat.sum(dim=0) if of_bias else None,
        )


class PackedLinear(nn.Module):
    """An nn.Linear for decoding, without gradient; its weight is in no state_dict."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.load(linear.weight)

    @torch.no_grad()
    def load(self, weight: torch.Tensor) -> None:
        """Take `weight` [out, in] in place of the one before."""
        self.packed = _in_order(weight.float().contiguous())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return _product(rows, self.packed, self.bias)


def pack_linears(model: nn.Module, tower: nn.Module | None) -> dict[str, PackedLinear]:
    """Pack the linear layers of a float32 model on a CPU that are large enough and share their weight with none, except
    those of its vision `tower`, which decodes nothing.

    Returns:
        The packed layers by the name of their weight, such as "lm_head.weight"; none where this is not supported.
    """
    if not is_supported():
        return {}
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    of_tower = set(tower.modules()) if tower is not None else set()
    found = {}
    for name, layer in list(model.named_modules()):
        weight = layer.weight if type(layer) is nn.Linear and layer not in of_tower else None
        if weight is None or weight.numel() < LARGE or uses[id(weight)] > 1:
            continue
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            found[f"{name}.weight"] = packed = PackedLinear(layer)
            model.set_submodule(name, packed)
    return found


def _in_order(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in], contiguous, in the order in which oneDNN reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows [..., in] times the transposed weight [out, in], which may be in order or not, plus bias."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
