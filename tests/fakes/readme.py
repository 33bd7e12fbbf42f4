"""What configs/README.md shows, as tests run it."""

from __future__ import annotations

from tests.conftest import REPOSITORY


def readme_term() -> str:
    """The source of my_terms.py."""
    return (REPOSITORY / "configs/README.md").read_text().split("```python\n# my_terms.py\n")[1].split("```")[0]
