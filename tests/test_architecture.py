"""Imports run one way, and no package imports another's private names."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import splade_fast

PACKAGE = Path(splade_fast.__file__).parent
SHARED = {"_checks", "_distributed", "_atomic_files", "_library", "_tensor_files", "_version"}
# A module may import from its own layer and from those below.
LAYERS = [
    {"_version", "_checks", "_atomic_files", "_library", "_tensor_files", "reference"},
    {"ops", "_distributed"},
    {"losses", "modules", "regularizers", "selftest"},
    {"encoders", "export", "integrations", "negative_cache", "search"},
    {"training"},
    {"recipe"},
    {"cli", "__main__"},
]
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def imports(module: Path) -> Iterator[tuple[str, ...]]:
    """Yield the parts below splade_fast of every name that a module imports, also in functions."""
    for node in ast.walk(ast.parse((PACKAGE / module).with_suffix(".py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "splade_fast" and parts:
                yield tuple(parts)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module):
    room = module.parts[0]
    if room == "__init__":
        return  # the front door
    for parts in imports(module):
        assert LAYER[parts[0]] <= LAYER[room], f"{module} imports {'.'.join(parts)} from above"
        if room == "reference":
            assert parts[0] == "reference", f"{module} imports {'.'.join(parts)}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_private_names_stay_in_their_package(module):
    package = module.parts[:-1]
    for parts in imports(module):
        for depth, name in enumerate(parts):
            if name.startswith("_") and not name.startswith("__"):
                is_own = parts[:depth] == package[:depth] and (depth > 0 or not package)
                is_shared = depth == 0 and name in SHARED
                assert is_own or is_shared, f"{module} imports {'.'.join(parts)}"


def test_no_imports_in_a_circle():
    """Imports inside of functions count too."""
    names = {path.parts[:-1] if path.name == "__init__" else path.parts for path in MODULES}
    needed = {
        path.parts: {
            next(parts[:n] for n in range(len(parts), 0, -1) if parts[:n] in names)
            for parts in imports(path)
        }
        for path in MODULES
        if path.name != "__init__"
    }
    list(TopologicalSorter(needed).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("room", ["ops", "reference"])
def test_ops_know_torch_alone(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert "transformers" not in path.read_text(), path
