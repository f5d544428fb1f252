"""BM25, the usual baseline of learned sparse retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s

from splade_fast.search.evaluation import Run
from splade_fast.search.texts import Texts


def bm25_run(documents: Texts, queries: Texts, k: int) -> Run:
    """Return the k best documents of each query by BM25, without those that score 0.

    bm25s computes the scores, with English stop words and without stemming.
    """
    retriever = bm25s.BM25()
    retriever.index(_tokens(documents.texts), show_progress=False)
    hits, scores = retriever.retrieve(
        _tokens(queries.texts), k=min(k, len(documents)), show_progress=False
    )
    return {
        query_id: {
            documents.ids[hit]: float(score)
            for hit, score in zip(row_hits, row_scores, strict=True)
            if score > 0
        }
        for query_id, row_hits, row_scores in zip(queries.ids, hits, scores, strict=True)
    }


def _tokens(texts: Sequence[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
