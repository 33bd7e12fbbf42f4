"""Linear attention (Gated DeltaNet, arXiv 2412.06464) over packed rows (`verl.models.packing`).

The layers of transformers read a row from its beginning to its end: in a packed row the state of one sequence would
leak into the next, and no error says so. Here prefixes of equal length run side by side from an empty state, and each
response goes on from the state behind its own prefix, which is computed once for all of them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from verl.models.cache import ResponseCache
from verl.models.packing import Segments, take


def read_segments(inner: nn.Module) -> None:
    """Let the linear attention of the Hugging Face model `inner` read packed rows."""
    for module in inner.modules():
        if isinstance(module, qwen.Qwen3_5GatedDeltaNet):
            module.forward = MethodType(forward, module)


def forward(
    self: qwen.Qwen3_5GatedDeltaNet,
    hidden_states: torch.Tensor,
    segments: Segments | None = None,
    cache: ResponseCache | None = None,
    **_: Any,
) -> torch.Tensor:
    """Linear attention of a packed row [1, T, H]; or, without segments, of one more token [rows, 1, H] of each response
    in `cache`, which keeps the states behind the prompts in a packed row."""
    projections = (self.in_proj_qkv, self.in_proj_b, self.in_proj_a)
    inputs = tuple(project(hidden_states) for project in projections)
    if segments is None:
        found, state = _scan(self, inputs, cache.states[self.layer_idx])
        cache.states[self.layer_idx] = state
    else:
        pieces, ends, states = [], [], []
        for bucket in segments.buckets:
            prefix, state = _scan(self, tuple(take(each[0], 0, bucket.prefixes) for each in inputs), None)
            pieces.append(prefix.flatten(0, 1))
            ends.append(bucket.prefixes[:, -1])
            states.append(state)
            if len(bucket.responses):
                own = tuple(take(each[0], 0, bucket.responses) for each in inputs)
                response, _ = _scan(self, own, tuple(take(each, 0, bucket.owner) for each in state))
                pieces.append(response.flatten(0, 1))
        found = take(torch.cat(pieces), 0, segments.order)[None]
        if cache is not None:
            joined = tuple(torch.cat(each) for each in zip(*states, strict=True))
            cache.add_states(self.layer_idx, torch.cat(ends), joined)
    gate = self.in_proj_z(hidden_states).unflatten(-1, (-1, self.head_v_dim))
    return self.out_proj(self.norm(found, gate).flatten(-2))


State = tuple[torch.Tensor, torch.Tensor]


def _scan(
    layer: qwen.Qwen3_5GatedDeltaNet, inputs: tuple[torch.Tensor, ...], state: State | None
) -> tuple[torch.Tensor, State]:
    """The outputs [N, L, heads, D] of N rows, and the state behind them.

    Args:
        inputs: Projections [N, L, .]: queries, keys and values; write strengths; decays.
        state: What came before: the last inputs [N, kernel - 1, C] of the convolution, and the memory
            [N, heads, key, value]; None at the beginning of a sequence.
    """
    mixed, strength, decay = inputs
    rows, length, channels = mixed.shape
    before = layer.conv_kernel_size - 1
    window, memory = state if state is not None else (mixed.new_zeros(rows, before, channels), None)
    seen = torch.cat([window, mixed], dim=1)
    convolved = qwen.causal_conv1d_fn(
        seen.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation=layer.activation
    )
    parts = convolved[:, :, before:].transpose(1, 2).split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (part.unflatten(-1, (-1, layer.head_k_dim)) for part in parts[:2])
    repeats = layer.num_v_heads // layer.num_k_heads
    # The recurrent rule is for generation: its kernel has no backward.
    one = length == 1 and not torch.is_grad_enabled()
    rule = qwen.torch_recurrent_gated_delta_rule if one else qwen.torch_chunk_gated_delta_rule
    found, memory = rule(
        query.repeat_interleave(repeats, dim=2),
        key.repeat_interleave(repeats, dim=2),
        parts[2].unflatten(-1, (-1, layer.head_v_dim)),
        g=-layer.A_log.float().exp() * F.softplus(decay.float() + layer.dt_bias),
        beta=strength.sigmoid(),
        initial_state=memory,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return found, (seen[:, length:], memory)
