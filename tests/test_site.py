"""The documentation site has an API page for everything public; `make docs` builds it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import splade_fast as sf

DOCS = Path(__file__).parents[1] / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(set(sf.__all__) - {"__version__", "build_info"}))
def test_has_an_api_page(name):
    public = getattr(sf, name)
    module = public.__name__ if isinstance(public, ModuleType) else public.__module__
    documented = load("hooks").api_modules()
    assert any(module == page or module.startswith(f"{page}.") for page in documented)


def test_other_pages_come_between_the_first_and_the_last():
    pages = ["limits.md", "exports.md", "index.md", "concepts.md", "a.md"]
    ordered = ["index.md", "concepts.md", "a.md", "exports.md", "limits.md"]
    assert load("hooks").in_order(pages) == ordered


def test_brackets_outside_of_code_are_no_links():
    escaped = load("docstrings").escaped
    assert escaped("x[i][j], `x[i]` and ```\nx[0]\n```") == (
        "x\\[i\\]\\[j\\], `x[i]` and ```\nx[0]\n```"
    )
