"""Retrieval quality, sparsity and index size of encoders on judged queries."""

from __future__ import annotations

import os
from typing import Any

from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.evaluation import check_judged_ids, evaluate_vectors, select_judged
from splade_fast.search.texts import Qrels, Texts, read_qrels, read_texts


class RetrievalEvaluator:
    """Encodes a corpus and queries, searches exactly, and measures what was found.

    Args:
        queries: the queries, of which those without judgements are left out.
        corpus: the documents, all of which are searched.
        qrels: {query id: {document id: relevance}}.
        max_query_length: tokens kept of each query.
        max_document_length: tokens kept of each document.
        batch_size: texts that go through a model together.
        document_top_k: keep at most so many entries of each document.
        query_top_k: keep at most so many entries of each query.
        query_prompt: the name of the prompt before each query; None: "query" where the model has
            it.
        document_prompt: the name of the prompt before each document; None: likewise "document".

    Raises:
        DataError: no query is judged, or the judgements name queries or documents that are not
            there.
    """

    def __init__(
        self,
        queries: Texts,
        corpus: Texts,
        qrels: Qrels,
        *,
        max_query_length: int = 64,
        max_document_length: int = 256,
        batch_size: int = 32,
        document_top_k: int | None = None,
        query_top_k: int | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        self.queries = select_judged(queries, qrels)
        check_judged_ids("corpus", corpus.ids, {doc_id for row in qrels.values() for doc_id in row})
        self.corpus = corpus
        self.qrels = qrels
        self.max_query_length = max_query_length
        self.max_document_length = max_document_length
        self.batch_size = batch_size
        self.document_top_k = document_top_k
        self.query_top_k = query_top_k
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt

    @classmethod
    def from_files(
        cls,
        queries: str | os.PathLike[str],
        corpus: str | os.PathLike[str],
        qrels: str | os.PathLike[str],
        **options: Any,
    ) -> RetrievalEvaluator:
        """Read files with `read_texts` and `read_qrels`; options as in the constructor.

        Raises:
            DataError: a file cannot be used.
        """
        found = read_texts(queries), read_texts(corpus), read_qrels(qrels)
        return cls(*found, **options)

    def __call__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        prefix: str = "",
        show_progress: bool = False,
    ) -> dict[str, float]:
        """MRR@10, nDCG@10, Recall@100, query_active_dims, document_active_dims and index_mib.

        Args:
            encoder: of the documents, and without query_encoder of the queries as well.
            query_encoder: of the queries.
            prefix: goes before each name, as in "eval_MRR@10".
            show_progress: draw a progress bar for the documents.

        Returns:
            {prefix + name: value}; active dims are the mean number of entries that are not 0,
            index_mib is the size of the documents' vectors.
        """
        documents = self._encode(
            encoder, "document", self.corpus, self.max_document_length, show_progress
        )
        queries = self._encode(
            query_encoder or encoder, "query", self.queries, self.max_query_length, False
        )
        return {prefix + name: value for name, value in self.measure(queries, documents).items()}

    def measure(self, queries: SparseRows, documents: SparseRows) -> dict[str, float]:
        """The same of vectors that are there already, those of all queries and of the corpus."""
        measures = evaluate_vectors(
            self.qrels, self.queries.ids, queries, self.corpus.ids, documents
        )
        return measures | {
            "query_active_dims": float(queries.lengths.float().mean()),
            "document_active_dims": float(documents.lengths.float().mean()),
            "index_mib": documents.nbytes / 2**20,
        }

    def _encode(
        self, encoder: TextEncoder, role: str, texts: Texts, max_length: int, show_progress: bool
    ) -> SparseRows:
        is_document = role == "document"
        prompt = self.document_prompt if is_document else self.query_prompt
        return encoder.encode(
            texts.texts,
            k=self.document_top_k if is_document else self.query_top_k,
            batch_size=self.batch_size,
            max_length=max_length,
            show_progress=show_progress,
            prompt_name=encoder.settings.prompt_for(role) if prompt is None else prompt,
        )
