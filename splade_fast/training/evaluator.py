"""Evaluation of encoders on judged queries: retrieval quality, sparsity and index size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.evaluation import (
    Run,
    search_judged,
    select_judged,
    select_qrels,
)
from splade_fast.search.measures import Measures
from splade_fast.search.retrieval_data import RetrievalData, read_retrieval_data
from splade_fast.search.search_once import Search, search_once
from splade_fast.search.texts import DataError, Qrels, Texts, read_qrels, read_texts


class RetrievalEvaluator:
    """Encode a corpus and queries, search exactly, and measure the hits.

    Args:
        queries: the queries; those without judgements are left out.
        corpus: the documents.
        qrels: judgements {query id: {document id: relevance}}.
        max_query_length: number of tokens kept of each query.
        max_document_length: number of tokens kept of each document.
        batch_size: number of texts that a model encodes at a time.
        document_top_k: number of entries kept of each document's vector; None keeps all.
        query_top_k: number of entries kept of each query's vector; None keeps all.
        query_prompt: name of the prompt before each query; None uses "query" where the model has
            that prompt.
        document_prompt: name of the prompt before each document; None uses "document", likewise.
        ignore_identical_ids: whether the document that has the id of the query is not searched, as
            in BEIR, where some queries (ArguAna, Quora) are documents themselves.
        measures: names of measures; see `splade_fast.search.measures.Measures`. By default MRR@10,
            nDCG@10 and Recall@100.

    Judged queries that are not among the queries do not count, and judged documents that are not in
    the corpus count as not retrieved; a warning tells their number, and that of vectors without
    entries.

    Raises:
        DataError: none of the queries is judged.
        TypeError: the texts are no `Texts`, or the judgements are no such mapping.
        ValueError: there is no such measure.

    Example::

        >>> from splade_fast.search.texts import Texts
        >>> from splade_fast.training import RetrievalEvaluator
        >>> corpus = Texts(["d1", "d2"], ["a quick fox", "the lazy dog"])
        >>> evaluator = RetrievalEvaluator(Texts(["q1"], ["fox"]), corpus, {"q1": {"d1": 1}})
        >>> metrics = evaluator(sf.SpladeEncoder.from_pretrained("CHECKPOINT"))
        >>> metrics["Recall@100"]
        1.0
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
        ignore_identical_ids: bool = False,
        measures: Sequence[str] | None = None,
    ) -> None:
        for name, texts in (("queries", queries), ("corpus", corpus)):
            if not isinstance(texts, Texts):
                raise TypeError(f"{name} must be Texts, got {type(texts).__name__}")
        if not corpus.ids:
            raise DataError("corpus must hold at least one document, got none")
        self.queries = select_judged(queries, qrels)
        self.qrels = select_qrels(qrels, self.queries.ids, corpus.ids)
        self.corpus = corpus
        self.max_query_length = max_query_length
        self.max_document_length = max_document_length
        self.batch_size = batch_size
        self.document_top_k = document_top_k
        self.query_top_k = query_top_k
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt
        self.ignore_identical_ids = ignore_identical_ids
        self.measures = Measures(measures)

    @classmethod
    def from_files(
        cls,
        queries: str | os.PathLike[str],
        corpus: str | os.PathLike[str],
        qrels: str | os.PathLike[str],
        **options: Any,
    ) -> RetrievalEvaluator:
        """Make an evaluator of three files.

        Args:
            queries: file for `read_texts`.
            corpus: file for `read_texts`.
            qrels: file for `read_qrels`.
            options: further arguments of the constructor.

        Raises:
            DataError: a file cannot be read, or its content is not what the constructor takes.
        """
        found = read_texts(queries), read_texts(corpus), read_qrels(qrels)
        return cls(*found, **options)

    @classmethod
    def from_data(
        cls, data: RetrievalData | str | os.PathLike[str], **options: Any
    ) -> RetrievalEvaluator:
        """Make an evaluator of a BEIR folder or a data set of that layout.

        Args:
            data: folder or hub name for `read_retrieval_data`, or what it returns.
            options: further arguments of the constructor.

        Raises:
            DataError: the data cannot be read, or its content is not what the constructor takes.
        """
        found = data if isinstance(data, RetrievalData) else read_retrieval_data(data)
        return cls(found.queries, found.corpus, found.qrels, **options)

    def __call__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        prefix: str = "",
        show_progress: bool = False,
    ) -> dict[str, float]:
        """Return the measures, active dims and the size of the index.

        Args:
            encoder: encoder of the documents.
            query_encoder: encoder of the queries; None uses `encoder`.
            prefix: prefix of each name, such as "eval_" for "eval_MRR@10".
            show_progress: whether to draw a progress bar for the documents.

        Returns:
            {prefix + name: value}. query_active_dims and document_active_dims are the mean numbers
            of entries other than 0; index_mib is the size of the documents' vectors in MiB.
        """
        vectors = self.encode(encoder, query_encoder, show_progress=show_progress)
        return {prefix + name: value for name, value in self.measure(*vectors).items()}

    def encode(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        show_progress: bool = False,
    ) -> tuple[SparseRows, SparseRows]:
        """Return the vectors of the judged queries and of the corpus.

        Args:
            encoder, query_encoder, show_progress: see `__call__`.
        """
        documents = self._encode(
            encoder, "document", self.corpus, self.max_document_length, show_progress
        )
        queries = self._encode(
            query_encoder or encoder, "query", self.queries, self.max_query_length, False
        )
        return queries, documents

    def search(
        self, queries: SparseRows, documents: SparseRows, *, search: Search = search_once
    ) -> Run:
        """Return the hits of each query, {query id: {document id: score}}, best first.

        Args:
            queries: (Q, V).
            documents: (N, V).
            search: see `search_judged`.
        """
        return search_judged(
            self.queries.ids,
            queries,
            self.corpus.ids,
            documents,
            depth=self.measures.depth,
            ignore_identical_ids=self.ignore_identical_ids,
            search=search,
        )

    def measure(self, queries: SparseRows, documents: SparseRows) -> dict[str, float]:
        """Return the same metrics for the vectors of the judged queries and of the corpus."""
        measures = self.measures.means(self.qrels, self.search(queries, documents))
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


class MeanEvaluator:
    """Measure an encoder on several sets of judged queries, each and by their mean.

    Args:
        evaluators: evaluators by the name of their set.

    Raises:
        ValueError: there is no evaluator.

    Example::

        >>> from splade_fast.search.texts import Texts
        >>> from splade_fast.training import MeanEvaluator, RetrievalEvaluator
        >>> corpus = Texts(["d1", "d2"], ["a quick fox", "the lazy dog"])
        >>> queries = Texts(["q1"], ["fox"])
        >>> evaluator = RetrievalEvaluator(queries, corpus, {"q1": {"d1": 1}}, measures=["R@2"])
        >>> several = MeanEvaluator({"foxes": evaluator, "again": evaluator})
        >>> metrics = several(sf.SpladeEncoder.from_pretrained("CHECKPOINT"))
        >>> metrics["R@2"], metrics["foxes/R@2"]
        (1.0, 1.0)
    """

    def __init__(self, evaluators: Mapping[str, RetrievalEvaluator]) -> None:
        if not evaluators:
            raise ValueError("evaluators must hold at least one evaluator, got none")
        self.evaluators = dict(evaluators)

    def __call__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        prefix: str = "",
        show_progress: bool = False,
    ) -> dict[str, float]:
        """Return {prefix + set/name: value} for each set, and {prefix + name: mean over the sets}.

        Args:
            encoder, query_encoder, prefix, show_progress: see `RetrievalEvaluator`.
        """
        by_set = {
            name: evaluator(encoder, query_encoder, show_progress=show_progress)
            for name, evaluator in self.evaluators.items()
        }
        return {prefix + name: value for name, value in mean_of_sets(by_set).items()} | {
            f"{prefix}{name}/{measure}": value
            for name, metrics in by_set.items()
            for measure, value in metrics.items()
        }


def mean_of_sets(by_set: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over several sets, {name: mean}.

    Args:
        by_set: {set: {name: value}}, with the same names for all sets.
    """
    sets = list(by_set.values())
    return {name: sum(values[name] for values in sets) / len(sets) for name in sets[0]}
