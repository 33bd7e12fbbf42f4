"""What `verl.plugins` calls: importing these modules registers views and loss terms."""

from __future__ import annotations


def register() -> None:
    """Make PAPO's corruption strategies and loss terms known to verl."""
    from papo import terms  # noqa: F401
    from papo.corruption import attention, block, fill, grid, random_patch  # noqa: F401
