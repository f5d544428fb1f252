"""A retrieval corpus of the docstrings of installed packages.

The summary line of a docstring is the query, and the rest of the docstring is the document to
find. The source files are parsed; no package is imported or executed.
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
    """A query, the one document that answers it, and the name of the documented object."""

    name: str
    query: str
    document: str


def docstring_pairs(packages: tuple[str, ...] = PACKAGES, processes: int = 2) -> list[Pair]:
    """Return the pairs of all installed packages, always in the same order.

    No two pairs share a query or a document, and no document contains its query verbatim.

    Args:
        packages: names of packages; those that are not installed have no pairs.
        processes: number of processes that parse the files.
    """
    files = [module_and_file for package in packages for module_and_file in source_files(package)]
    # Garbage collection would take a quarter of the time, because syntax trees have many objects.
    with ProcessPoolExecutor(processes, initializer=gc.disable) as pool:
        per_file = pool.map(_parse_file, files, chunksize=64)
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
    """Return `count` items at equal distances, in their order, or all items if there are fewer."""
    return items[:: max(1, len(items) // count)][:count]


def source_files(package: str) -> list[tuple[str, Path]]:
    """Return (module name, file) of every module of a package, sorted, without its tests.

    The list is empty if the package is not installed.
    """
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


def parse_pairs(source: str, name: str) -> list[Pair]:
    """Return the pairs of one module, in the order of its source.

    Args:
        source: the Python source of the module.
        name: the dotted name of the module.

    Raises:
        SyntaxError: source is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some docstrings have invalid escape sequences
        tree = ast.parse(source)
    return [
        Pair(where, query, document)
        for where, docstring in _docstrings(tree, name)
        if (split := split_docstring(docstring)) is not None
        for query, document in [split]
    ]


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Split a docstring into its summary and the rest, both without line breaks.

    Returns:
        (summary, rest), or None if one of them is too short, the summary is too long, or the rest
        repeats the summary.
    """
    summary, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    query = " ".join(summary.split())
    words = rest.split()
    document = " ".join(words[:_MAX_DOCUMENT_WORDS])
    if not _MIN_QUERY_WORDS <= len(re.findall(r"[A-Za-z]{2,}", query)) <= _MAX_QUERY_WORDS:
        return None
    if len(words) < _MIN_DOCUMENT_WORDS or query.lower() in document.lower():
        return None
    return query, document


def _parse_file(module_and_file: tuple[str, Path]) -> list[Pair]:
    module, file = module_and_file
    try:
        return parse_pairs(file.read_text(encoding="utf-8"), module)
    except (SyntaxError, UnicodeDecodeError):
        return []  # packages contain templates that are not valid Python


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler):
            continue  # expressions contain no definitions
        inner = getattr(child, "name", None) if isinstance(child, _Documented) else None
        yield from _docstrings(child, f"{name}.{inner}" if inner else name)
