"""Docstrings start with a verb in the imperative or with the noun that they name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("splade_fast", "benchmarks", "examples", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
# First words of a sentence that has lost its subject or its verb.
WRONG_STARTS = {
    *("How", "Of", "That", "Those", "What", "Whatever", "When", "Where", "Which", "Who", "Whose"),
    *("And", "As", "But", "By", "From", "In", "Not", "So", "With"),
}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_docstrings_start_with_a_verb_or_a_noun(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first, *_ = (ast.get_docstring(node) or "Empty").split()
            line = getattr(node, "lineno", 1)
            assert first not in WRONG_STARTS, f"{file}:{line} starts with {first}"
