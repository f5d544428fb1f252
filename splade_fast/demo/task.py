"""What the demo works on: a corpus, and where known, queries with their judgements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splade_fast.data import DataError, Qrels, Texts, read_qrels, read_texts
from splade_fast.demo.corpus import PACKAGES, docstring_pairs

DOCSTRING_QUESTIONS = (
    "how do I sort the elements of a tensor",
    "shortest path between two nodes of a graph",
    "solve a system of differential equations",
)


@dataclass
class Task:
    """A corpus with judged queries, both None if there are none, and questions to show."""

    documents: Texts
    queries: Texts | None
    qrels: Qrels | None
    questions: list[str]


def docstring_task(limit: int | None, num_queries: int) -> Task:
    """Find each docstring by its summary, among the docstrings of the installed packages.

    Raises:
        DataError: none of the packages is installed.
    """
    pairs = docstring_pairs()
    if not pairs:
        raise DataError(f"one of {', '.join(PACKAGES)} must be installed, got none")
    # Every so many pairs, so that a limit takes from all packages.
    pairs = pairs[:: max(1, len(pairs) // limit)][:limit] if limit else pairs
    ids = [str(number) for number in range(len(pairs))]
    names = [f"{pair.name}#{number}" for number, pair in enumerate(pairs)]
    asked = range(0, len(pairs), max(1, len(pairs) // num_queries))[:num_queries]
    return Task(
        documents=Texts(names, [pair.document for pair in pairs]),
        queries=Texts([ids[i] for i in asked], [pairs[i].query for i in asked]),
        qrels={ids[i]: {names[i]: 1} for i in asked},
        questions=list(DOCSTRING_QUESTIONS),
    )


def file_task(corpus: Path, queries: Path | None, qrels: Path | None, limit: int | None) -> Task:
    """A corpus of the user's own; evaluated only with both queries and qrels.

    Raises:
        DataError: a file is missing or malformed, or qrels come without queries.
    """
    documents = read_texts(corpus)
    if limit is not None:
        documents = Texts(documents.ids[:limit], documents.texts[:limit])
    if qrels is not None and queries is None:
        raise DataError("--qrels needs --queries")
    asked = read_texts(queries) if queries else None
    return Task(
        documents=documents,
        queries=asked,
        qrels=read_qrels(qrels) if qrels else None,
        questions=asked.texts[:3] if asked else [],
    )
