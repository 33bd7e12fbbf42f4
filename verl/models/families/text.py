"""Families without a vision tower."""

from __future__ import annotations

from verl.models.families.base import Family

FAMILIES = {"qwen2": Family("Qwen2.5"), "qwen3": Family("Qwen3")}
