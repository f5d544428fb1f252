"""A retrieval corpus of the docstrings of installed packages.

A docstring's summary is a short question about the rest of it, and nobody wrote either with
retrieval in mind. The packages' files are parsed; nothing of them is imported or executed.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PACKAGES = ("torch", "transformers", "numpy", "scipy", "sympy", "networkx")

_Item = TypeVar("_Item")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_MIN_QUERY_WORDS = 3
_MAX_QUERY_WORDS = 40
_MIN_DOCUMENT_WORDS = 20
_MAX_DOCUMENT_WORDS = 400


@dataclass(frozen=True)
class Pair:
    """A query and the one document that answers it, named after where the docstring stands."""

    name: str
    query: str
    document: str


def docstring_pairs(packages: tuple[str, ...] = PACKAGES, processes: int = 2) -> list[Pair]:
    """All pairs of the packages that are installed, in the same order every time.

    No two pairs share a query or a document, and no document contains its query verbatim.
    """
    files = [module_and_file for package in packages for module_and_file in source_files(package)]
    # Collecting garbage while large trees grow would take a quarter of the time.
    with ProcessPoolExecutor(processes, initializer=gc.disable) as pool:
        per_file = pool.map(_pairs_of_file, files, chunksize=64)
        candidates = [pair for pairs in per_file for pair in pairs]
    queries: set[str] = set()
    documents: set[str] = set()
    unique = []
    for pair in candidates:
        if pair.query.lower() not in queries and pair.document not in documents:
            unique.append(pair)
        queries.add(pair.query.lower())
        documents.add(pair.document)
    return unique


def spread(items: Sequence[_Item], count: int) -> Sequence[_Item]:
    """So many of the items, from all over them and in their order; all, where they are fewer."""
    return items[:: max(1, len(items) // count)][:count]


def source_files(package: str) -> list[tuple[str, Path]]:
    """(module name, file) of the package, tests left out, sorted; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    found = []
    for root in spec.submodule_search_locations:
        for file in Path(root).rglob("*.py"):
            parts = (package, *file.relative_to(root).with_suffix("").parts)
            if "tests" not in parts:
                found.append((".".join(parts).removesuffix(".__init__"), file))
    return sorted(found)


def pairs_of_source(source: str, name: str) -> list[Pair]:
    """The pairs of one module's source text, in its order.

    Raises:
        SyntaxError: the text is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        tree = ast.parse(source)
    return [
        Pair(where, query, document)
        for where, docstring in _docstrings(tree, name)
        if (split := split_docstring(docstring)) is not None
        for query, document in [split]
    ]


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary, rest) as running text; None if they are too short or the rest repeats it."""
    summary, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    query = " ".join(summary.split())
    words = rest.split()
    document = " ".join(words[:_MAX_DOCUMENT_WORDS])
    if not _MIN_QUERY_WORDS <= len(re.findall(r"[A-Za-z]{2,}", query)) <= _MAX_QUERY_WORDS:
        return None
    if len(words) < _MIN_DOCUMENT_WORDS or query.lower() in document.lower():
        return None
    return query, document


def _pairs_of_file(module_and_file: tuple[str, Path]) -> list[Pair]:
    module, file = module_and_file
    try:
        return pairs_of_source(file.read_text(encoding="utf-8"), module)
    except (SyntaxError, UnicodeDecodeError):
        return []  # templates that are not meant to parse


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler):
            continue  # no definitions inside expressions
        inner = getattr(child, "name", None) if isinstance(child, _Documented) else None
        yield from _docstrings(child, f"{name}.{inner}" if inner else name)
