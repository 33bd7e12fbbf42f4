"""Qwen3.5: Qwen3-VL's images and positions over a language model most of whose layers are linear attention."""

from __future__ import annotations

from torch import nn

from verl.models.families.qwen_vl import QwenVL


class Qwen3_5(QwenVL):
    linear_attention = True

    def prepare(self, inner: nn.Module) -> None:
        from verl.models.delta_net import read_segments

        read_segments(inner)


FAMILIES = {"qwen3_5": Qwen3_5("Qwen3.5")}
