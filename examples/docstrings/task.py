"""Tasks of the demo: a corpus and, where known, queries with their judgements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.docstrings.corpus import PACKAGES, Pair, spread
from examples.docstrings.training import split_pairs
from splade_fast.search.evaluation import select_judged, select_qrels
from splade_fast.search.texts import DataError, Qrels, Texts, read_qrels, read_texts
from splade_fast.training.evaluator import RetrievalEvaluator

DOCSTRING_QUESTIONS = (
    "how do I sort the elements of a tensor",
    "shortest path between two nodes of a graph",
    "solve a system of differential equations",
)


@dataclass
class Task:
    """A corpus, queries with judgements, example questions, and pairs to train on.

    `queries` and `qrels` may be None. No judged query is from a module of the training pairs.
    """

    documents: Texts
    queries: Texts | None
    qrels: Qrels | None
    questions: list[str]
    training: list[Pair] = field(default_factory=list)


def docstring_task(pairs: Sequence[Pair], limit: int | None, num_queries: int) -> Task:
    """Build the task of finding each docstring by its summary among all docstrings.

    The judged queries come from held-out modules. The pairs of the other modules are for training.

    Args:
        pairs: all pairs, from `docstring_pairs`.
        limit: number of pairs to use, spread over all of them; None uses all.
        num_queries: number of judged queries.

    Raises:
        DataError: there are no pairs, or the limit leaves none to train on or to ask for.
    """
    if not pairs:
        raise DataError(f"one of {', '.join(PACKAGES)} must be installed, got none")
    if limit:
        pairs = spread(pairs, limit)  # of all packages
    split = split_pairs(pairs)
    if not split.held_out or not split.training:
        raise DataError(f"limit must leave pairs to train on and to ask for, got {limit}")
    names = {pair: f"{pair.name}#{number}" for number, pair in enumerate(pairs)}
    asked = spread(split.held_out, num_queries)
    ids = [str(number) for number in range(len(asked))]
    return Task(
        documents=Texts(list(names.values()), [pair.document for pair in pairs]),
        queries=Texts(ids, [pair.query for pair in asked]),
        qrels={i: {names[pair]: 1} for i, pair in zip(ids, asked, strict=True)},
        questions=list(DOCSTRING_QUESTIONS),
        training=split.training,
    )


def held_out_evaluator(task: Task, max_length: int) -> RetrievalEvaluator:
    """Return an evaluator that ranks for each judged query the relevant documents of all queries.

    It is quick enough to run during a training, as the whole corpus is not encoded.

    Args:
        task: a task with judgements.
        max_length: number of tokens kept of each text.
    """
    assert task.queries is not None
    assert task.qrels is not None
    relevant = {document for judged in task.qrels.values() for document in judged}
    kept = [place for place, document in enumerate(task.documents.ids) if document in relevant]
    ids, texts = task.documents.ids, task.documents.texts
    documents = Texts([ids[place] for place in kept], [texts[place] for place in kept])
    return RetrievalEvaluator(
        task.queries,
        documents,
        task.qrels,
        max_query_length=max_length,
        max_document_length=max_length,
    )


def file_task(corpus: Path, queries: Path | None, qrels: Path | None, limit: int | None) -> Task:
    """Read the task from the files of a user; an evaluation needs both queries and qrels.

    Raises:
        DataError: a file is missing or malformed, or qrels come without queries or judge none of
            them.
    """
    documents = read_texts(corpus)
    if limit is not None:
        documents = Texts(documents.ids[:limit], documents.texts[:limit])
    if qrels is not None and queries is None:
        raise DataError("--qrels needs --queries")
    asked = read_texts(queries) if queries else None
    judgements = read_qrels(qrels) if qrels else None
    if asked is not None and judgements is not None:
        asked = select_judged(asked, judgements)
        judgements = select_qrels(judgements, asked.ids, documents.ids)
    return Task(
        documents=documents,
        queries=asked,
        qrels=judgements,
        questions=asked.texts[:3] if asked else [],
    )
