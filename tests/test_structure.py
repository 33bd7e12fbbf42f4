"""The habits of the code that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = sorted([*(REPOSITORY / "verl").rglob("*.py"), *(REPOSITORY / "papo").rglob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Each package may import those below it, and itself.
LAYERS = [
    {"trainer"},
    {"single_controller", "tracking"},
    {"workers"},
    {"data"},
    {"models", "algorithms", "legacy"},
    {"config", "metrics", "registry", "plugins", "protocol", "columns", "checkpoint", "utils"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), "logging, not print"


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p).startswith("verl")], ids=relative)
def test_verl_does_not_import_papo_and_imports_point_down(path):
    modules = imports(path)
    assert not any(m == "papo" or m.startswith("papo.") for m in modules)
    own = relative(path).removesuffix(".py").split("/")[1]
    for module in modules:
        parts = module.split(".")
        if parts[0] == "verl" and len(parts) > 1 and own in LEVEL and parts[1] in LEVEL:
            assert LEVEL[parts[1]] >= LEVEL[own], f"{own} imports {module}, which lies above it"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "verl/algorithms").rglob("*.py")), ids=relative)
def test_the_mathematics_needs_torch_and_nothing_else_of_weight(path):
    heavy = {"ray", "transformers", "datasets", "numpy", "PIL", "vllm"}
    assert not {module.split(".")[0] for module in imports(path)} & heavy
    assert not any(module.startswith("verl.protocol") for module in imports(path))


def imports_at_start(path: Path) -> set[str]:
    """Modules of this repository that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_module_imports_itself_by_way_of_others():
    names = {relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}
    graph = {name: {m for m in imports_at_start(path) if m in names and m != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
