"""Linear layers by oneDNN say what torch's own say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from verl.models.onednn import PackedLinear, TrainedLinear, is_supported, pack_linears, use_onednn

pytestmark = pytest.mark.skipif(not is_supported(), reason="only on x86")


@pytest.mark.parametrize("shape", [(512,), (0, 512), (1, 512), (1, 700, 512), (3, 5, 512)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_and_their_gradients_are_those_of_torch(shape, bias):
    plain = nn.Linear(512, 300, bias=bias)
    other = nn.Sequential(copy.deepcopy(plain))
    use_onednn(other)
    assert type(other[0]) is TrainedLinear
    rows = torch.randn(shape)
    for weights in (torch.randn(*shape[:-1], 300), torch.ones(300)):  # and a gradient that is one number everywhere
        found = []
        for layer in (plain, other):
            layer.zero_grad()
            given = rows.clone().requires_grad_()
            values = layer(given)
            (values * weights).sum().backward()
            found.append([values.detach(), given.grad, *(weight.grad for weight in layer.parameters())])
        for expected, value in zip(*found, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(PackedLinear(plain)(rows), plain(rows), atol=1e-5, rtol=1e-5)


def test_a_frozen_layer_has_a_gradient_of_its_rows_alone():
    layer = nn.Sequential(nn.Linear(512, 256).requires_grad_(False))
    use_onednn(layer)
    rows = torch.randn(4, 512, requires_grad=True)
    layer(rows).sum().backward()
    torch.testing.assert_close(rows.grad, layer[0].weight.sum(0).expand(4, -1), atol=1e-5, rtol=1e-5)
    assert layer[0].weight.grad is None and layer[0].bias.grad is None


def test_only_large_layers_are_changed_and_packed_only_with_a_weight_of_their_own():
    model = nn.ModuleDict({"large": nn.Linear(512, 256), "small": nn.Linear(511, 256), "head": nn.Linear(512, 256)})
    model["embedding"] = nn.Embedding(256, 512)
    model["head"].weight = model["embedding"].weight
    model["tower"] = nn.Sequential(nn.Linear(512, 256))
    trained = copy.deepcopy(model)
    use_onednn(trained)
    changed = [name for name, layer in trained.named_modules() if type(layer) is TrainedLinear]
    assert changed == ["large", "head", "tower.0"]
    assert trained["head"].weight is trained["embedding"].weight
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert list(pack_linears(model, model["tower"])) == ["large.weight"]
    assert not pack_linears(nn.Sequential(nn.Linear(512, 256, dtype=torch.bfloat16)), None)
