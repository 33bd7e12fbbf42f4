"""PAPO, Perception-Aware Policy Optimization (arXiv 2507.06448), as a plugin of verl, and its Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papo.api.config import PAPOConfig
    from papo.api.trainer import PAPOTrainer

__all__ = ["PAPOConfig", "PAPOTrainer"]


def __getattr__(name: str) -> Any:
    """The API's classes, imported when they are asked for: every worker process imports this package."""
    if name == "PAPOConfig":
        from papo.api.config import PAPOConfig

        return PAPOConfig
    if name == "PAPOTrainer":
        from papo.api.trainer import PAPOTrainer

        return PAPOTrainer
    raise AttributeError(f"module 'papo' has no attribute '{name}'")
