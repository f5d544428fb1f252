"""MiningTask: queries with relevant documents, from judgements or from pairs of texts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from splade_fast.recipe.negatives import Judged
from splade_fast.search.evaluation import select_judged, select_qrels
from splade_fast.search.qrels import Qrels, read_qrels
from splade_fast.search.texts import DataError, Texts, read_texts
from splade_fast.training.data.load import load_training_data

TextsOrFile = Texts | str | os.PathLike[str]


@dataclass
class MiningTask:
    """Queries, a corpus, and which documents are relevant to which query.

    Args:
        queries: the judged queries.
        corpus: the documents.
        qrels: judgements {query id: {document id: relevance}}.

    Example::

        >>> from pathlib import Path
        >>> _ = Path("pairs.tsv").write_text("quick fox\\ta quick brown fox\\n")
        >>> sf.recipe.MiningTask.from_pairs("pairs.tsv").qrels
        {'q0': {'d0': 1}}
    """

    queries: Texts
    corpus: Texts
    qrels: Qrels

    @classmethod
    def from_judgements(
        cls, queries: TextsOrFile, corpus: TextsOrFile, qrels: Qrels | str | os.PathLike[str]
    ) -> MiningTask:
        """Make a task of queries, a corpus and judgements.

        Args:
            queries: Texts, or a file for `read_texts`.
            corpus: Texts, or a file for `read_texts`.
            qrels: {query id: {document id: relevance}}, or a file for `read_qrels`.

        Raises:
            DataError: a file cannot be read, or none of the queries is judged.
        """
        judgements = dict(qrels) if isinstance(qrels, Mapping) else read_qrels(qrels)
        documents = _read(corpus)
        judged = select_judged(_read(queries), judgements)
        return cls(judged, documents, select_qrels(judgements, judged.ids, documents.ids))

    @classmethod
    def from_pairs(cls, pairs: Any, corpus: TextsOrFile | None = None) -> MiningTask:
        """Make a task of pairs of a query and a relevant document.

        Equal texts are one query or one document. A document of the pairs that the corpus lacks is
        added to it.

        Args:
            pairs: source of `load_training_data` that holds pairs; their negatives do not count.
            corpus: Texts, or a file for `read_texts`; by default the documents of the pairs alone.

        Raises:
            DataError: the source cannot be read, or holds other examples than pairs.
        """
        documents = Texts([], []) if corpus is None else _read(corpus)
        doc_ids = dict(zip(documents.texts, documents.ids, strict=True))
        texts = dict(zip(documents.ids, documents.texts, strict=True))
        query_ids: dict[str, str] = {}
        qrels: Qrels = {}
        for example in load_training_data(pairs, streaming=True):
            if "document" not in example or "label" in example:
                raise DataError(
                    f"pairs must hold a query and a document each, got {', '.join(example)}"
                )
            query, document = example["query"], example["document"]
            if document not in doc_ids:
                doc_id = _new_id(texts)
                doc_ids[document], texts[doc_id] = doc_id, document
            query_id = query_ids.setdefault(query, f"q{len(query_ids)}")
            qrels.setdefault(query_id, {})[doc_ids[document]] = 1
        if not qrels:
            raise DataError("pairs must hold at least one pair, got none")
        queries = Texts(list(query_ids.values()), list(query_ids))
        return cls(queries, Texts(list(texts), list(texts.values())), qrels)

    def judged(self, min_relevance: int) -> list[Judged]:
        """Return the queries that have a relevant document in the corpus.

        Args:
            min_relevance: least relevance of a relevant document.
        """
        numbers = {doc_id: number for number, doc_id in enumerate(self.corpus.ids)}
        found = []
        for query_id, query in zip(self.queries.ids, self.queries.texts, strict=True):
            relevant = [d for d, grade in self.qrels[query_id].items() if grade >= min_relevance]
            positives = [numbers[doc_id] for doc_id in relevant if doc_id in numbers]
            if positives:
                found.append(Judged(query_id, query, positives, set(relevant)))
        if not found:
            raise DataError(
                f"qrels must have a document of the corpus with a relevance of {min_relevance} or "
                "more, got none"
            )
        return found


def _read(texts: TextsOrFile) -> Texts:
    return texts if isinstance(texts, Texts) else read_texts(texts)


def _new_id(known: Collection[str]) -> str:
    """Return an id that is not known yet."""
    return next(found for number in count(len(known)) if (found := f"d{number}") not in known)
