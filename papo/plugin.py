"""What `verl.plugins` calls: importing these modules registers views, loss terms and shapers."""

from __future__ import annotations


def register() -> None:
    """Make PAPO's corruption strategies, loss terms and advantage shapers known to verl."""
    from papo import terms, vppo  # noqa: F401
    from papo.corruption import attention, block, fill, grid, random_patch  # noqa: F401
