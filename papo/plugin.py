"""What `verl.plugins` calls: importing these modules registers views, loss terms and old keys."""

from __future__ import annotations


def register() -> None:
    """Make PAPO's corruption strategies, loss terms and old keys known to verl."""
    from papo import legacy, terms  # noqa: F401
    from papo.corruption import attention, block, fill, grid, random_patch  # noqa: F401
