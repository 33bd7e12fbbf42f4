"""Plugin of verl: importing these modules registers views, loss terms, shapers and old keys."""

from __future__ import annotations


def register() -> None:
    """Make PAPO's corruption strategies, loss terms, advantage shapers and old keys known to verl."""
    from papo import legacy, shaping, terms  # noqa: F401
    from papo.corruption import attention, fill, patches  # noqa: F401
