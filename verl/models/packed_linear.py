"""Linear layers for decoding on a CPU: weights in the order in which oneDNN reads them.

torch's own product puts the weights in that order at every call. In training that is a small share of the time; with
the few dozen rows of a decoding step it is a third. These are the operators that torch.compile uses for weights that do
not change; torch has no public name for them.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

WORTH_PACKING = 2**17  # weights of a layer; a product with fewer takes no longer than the call of the other operator


class PackedLinear(nn.Module):
    """The same as an nn.Linear in float32, without gradient; its weight is in no state_dict."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.load(linear.weight)

    @torch.no_grad()
    def load(self, weight: torch.Tensor) -> None:
        """Take `weight` [out, in] in place of the one before."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")


def is_supported() -> bool:
    """Whether torch has oneDNN and the CPU is one of x86; others have not been tried."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


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
        if weight is None or weight.numel() < WORTH_PACKING or uses[id(weight)] > 1:
            continue
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            found[f"{name}.weight"] = packed = PackedLinear(layer)
            model.set_submodule(name, packed)
    return found
