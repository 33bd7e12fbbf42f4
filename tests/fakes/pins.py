"""What setup.py asks for, without running its setup()."""

from __future__ import annotations

import ast
from typing import Any

from tests.conftest import REPOSITORY


def setup_values() -> dict[str, Any]:
    """The constants of setup.py: REQUIRES, EXTRAS and what they are made of."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    constants = ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], type_ignores=[])
    values: dict[str, Any] = {}
    exec(compile(constants, "setup.py", "exec"), values)
    return values
