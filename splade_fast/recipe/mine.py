"""mine_hard_negatives: documents that a model ranks high for a query, though they are not relevant.

Source: `Xiong et al. 2021 <https://arxiv.org/abs/2007.00808>`_ and, for the margins,
`NV-Retriever <https://arxiv.org/abs/2407.15831>`_.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from splade_fast._checks import check_count
from splade_fast._library import is_cpu_library_loaded
from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.ops.score import sparse_scores, sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.recipe.negatives import Judged, MiningReport, NegativeRules, choose_negatives
from splade_fast.recipe.part_files import PartFiles
from splade_fast.recipe.tasks import MiningTask
from splade_fast.search.checksum import count_and_checksum
from splade_fast.search.encode_corpus import encode_corpus
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.hits import list_hits
from splade_fast.search.index import Index
from splade_fast.search.queries import encode_queries
from splade_fast.search.sparse_index import SparseIndex
from splade_fast.search.texts import DataError, Texts

Search = Callable[[SparseRows, int], tuple[Tensor, Tensor]]


def mine_hard_negatives(
    encoder: TextEncoder,
    task: MiningTask,
    path: str | os.PathLike[str],
    rules: NegativeRules | None = None,
    *,
    query_encoder: TextEncoder | None = None,
    index: str | os.PathLike[str] | None = None,
    has_texts: bool = True,
    k: int | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    chunk_size: int = 1024,
    resume: bool = False,
    show_progress: bool = True,
) -> MiningReport:
    """Write the hard negatives of each query and positive, found by exact search.

    A line of the file is an object with query_id, query, document_id, document (the positive),
    negative_ids and negatives, best first. `load_training_data` and `splade-fast train` read it.
    The file appears complete or not at all.

    The texts and the index are held in memory, and the hits of one chunk of queries. Chunks that
    are finished stay after an error, and after the end of the program at any time; `resume=True`
    goes on with them and writes the same bytes.

    Args:
        encoder: encoder of the documents.
        task: queries, corpus and judgements, or pairs.
        path: file to write; must not exist.
        rules: rules by which hits become negatives; by default those of `NegativeRules()`.
        query_encoder: encoder of the queries, if it is not `encoder`.
        index: folder of the corpus's vectors that `encode_corpus` has written, whose ids are in the
            corpus; by default the corpus is encoded.
        has_texts: whether to write texts beside ids. Without them, `load_training_data` takes the
            files of queries and corpus as well.
        k: number of entries kept of each document's vector, if the corpus is encoded.
        batch_size: number of texts that a model encodes at a time.
        max_length: number of tokens kept of each text; that of the index where there is one.
        chunk_size: number of queries that are searched at a time.
        resume: go on with the chunks that an interrupted call has finished.
        show_progress: draw progress bars.

    Returns:
        Counts of pairs and negatives, and of the hits that each guard dropped.

    Raises:
        TypeError: a count is not an integer.
        ValueError: an argument is out of range, a vector is not finite, the index holds other
            documents than the corpus, or the chunks belong to other data or settings.
        FileExistsError: `path` exists.
        OSError: the file system failed.

    Example::

        >>> from splade_fast.recipe import MiningTask, NegativeRules, mine_hard_negatives
        >>> from splade_fast.search.texts import Texts
        >>> corpus = Texts(["d1", "d2", "d3"], ["a quick fox", "a lazy dog", "an old tree"])
        >>> queries = Texts(["q1"], ["fox"])
        >>> task = MiningTask.from_judgements(queries, corpus, {"q1": {"d1": 1}})
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> rules = NegativeRules(num_negatives=2)
        >>> mine_hard_negatives(encoder, task, "mined.jsonl", rules, show_progress=False).negatives
        2
    """
    rules = rules or NegativeRules()
    chunk_size = check_count("chunk_size", chunk_size, 1)
    queries = encoder if query_encoder is None else query_encoder
    check_vocabularies(encoder, queries)
    judged = task.judged(rules.min_relevance)
    stored = None if index is None else Index.load(index)
    if stored is not None:
        max_length = stored.meta.max_length
        if stored.rows.num_cols != queries.vocab_size:
            raise DataError(
                f"index must have the vocabulary of the encoder, {queries.vocab_size} entries, "
                f"got {stored.rows.num_cols}"
            )
    parts = PartFiles(path)
    settings = asdict(rules) | {
        "queries": count_and_checksum(
            (one.query_id, one.query, *sorted(one.relevant_ids)) for one in judged
        )[1],
        "corpus": count_and_checksum(zip(task.corpus.ids, task.corpus.texts, strict=True))[1],
        "index": None if stored is None else asdict(stored.meta),
        "encoder of documents": (
            None if index is not None else asdict(Fingerprint.of(encoder, "document", max_length))
        ),
        "encoder of queries": asdict(Fingerprint.of(queries, "query", max_length)),
        "k": k,
        "max_length": max_length,
        "chunk_size": chunk_size,
        "has_texts": has_texts,
    }
    report = MiningReport()
    with parts.claim(settings, resume=resume, verb="mine"):
        if stored is None:
            stored = _encode(
                encoder, task.corpus, parts.index, k, batch_size, max_length, resume, show_progress
            )
        miner = _Miner.build(stored, task.corpus, rules, encoder.device, show_progress)
        starts = range(0, len(judged), chunk_size)
        with tqdm(total=len(judged), unit="query", disable=not show_progress) as progress:
            for number, start in enumerate(starts):
                chunk = judged[start : start + chunk_size]
                notes = parts.read_notes(number)
                if notes is None:
                    texts = [one.query for one in chunk]
                    vectors = encode_queries(queries, texts, max_length, batch_size)
                    _check_finite(vectors, chunk)
                    own, rows = miner.mine(chunk, vectors, has_texts)
                    notes = asdict(own)
                    parts.write(number, notes, rows)
                report.add(MiningReport(**notes))
                progress.update(len(chunk))
        parts.join(len(starts))
    return report


@dataclass
class _Miner:
    """Search of a corpus, and the choice of negatives among its hits."""

    ids: list[str]
    texts: Sequence[str]
    rows: SparseRows
    search: Search
    rules: NegativeRules

    @classmethod
    def build(
        cls,
        index: Index,
        corpus: Texts,
        rules: NegativeRules,
        device: torch.device,
        show_progress: bool,
    ) -> _Miner:
        """Make the search of an index, and order the texts as the index has them."""
        texts_by_id = dict(zip(corpus.ids, corpus.texts, strict=True))
        missing = [doc_id for doc_id in index.ids if doc_id not in texts_by_id]
        if missing or len(index.ids) != len(corpus.ids):
            got = f"{missing[0]!r}" if missing else f"{len(index.ids)} of {len(corpus.ids)}"
            raise DataError(f"index must hold the documents of the corpus, got {got}")
        texts = [texts_by_id[doc_id] for doc_id in index.ids]
        search = _make_search(index.rows, device, show_progress)
        return cls(index.ids, texts, index.rows, search, rules)

    def mine(
        self, chunk: Sequence[Judged], vectors: SparseRows, has_texts: bool
    ) -> tuple[MiningReport, list[dict[str, Any]]]:
        """Return the report and the lines of some queries.

        Args:
            chunk: Q queries.
            vectors: (Q, V).
            has_texts: whether the lines hold texts beside ids.
        """
        hits = list_hits(*self.search(vectors, self.rules.last_rank))
        positives = sorted({number for judged in chunk for number in judged.positives})
        scores = sparse_scores(vectors, self.rows[torch.tensor(positives)])
        columns = {number: column for column, number in enumerate(positives)}
        report = MiningReport(queries=len(chunk))
        lines = []
        for row, (judged, found) in enumerate(zip(chunk, hits, strict=True)):
            for positive in judged.positives:
                score = float(scores[row, columns[positive]])
                negatives = choose_negatives(
                    judged, positive, score, found, self.ids, self.texts, self.rules, report
                )
                if negatives:
                    lines.append(self._line(judged, positive, negatives, has_texts))
        return report, lines

    def _line(
        self, judged: Judged, positive: int, negatives: Sequence[int], has_texts: bool
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"query_id": judged.query_id}
        if has_texts:
            line["query"] = judged.query
        line["document_id"] = self.ids[positive]
        if has_texts:
            line["document"] = self.texts[positive]
        line["negative_ids"] = [self.ids[number] for number in negatives]
        if has_texts:
            line["negatives"] = [self.texts[number] for number in negatives]
        return line


def _encode(
    encoder: TextEncoder,
    corpus: Texts,
    folder: Path,
    k: int | None,
    batch_size: int,
    max_length: int,
    resume: bool,
    show_progress: bool,
) -> Index:
    """Return the index of the corpus, which is encoded into a folder unless it is there."""
    if not folder.exists():
        file = folder.with_name("corpus.jsonl")
        with file.open("w", encoding="utf-8") as lines:
            for doc_id, text in zip(corpus.ids, corpus.texts, strict=True):
                lines.write(json.dumps({"id": doc_id, "text": text}) + "\n")
        encode_corpus(
            encoder,
            file,
            folder,
            model="unnamed",
            k=k,
            batch_size=batch_size,
            max_length=max_length,
            show_progress=show_progress,
            resume=resume,
        )
        file.unlink()
    return Index.load(folder)


def _make_search(rows: SparseRows, device: torch.device, show_progress: bool) -> Search:
    """Return a function that searches the rows exactly, on a device."""
    if device.type == "cpu" and is_cpu_library_loaded() and _is_positive(rows):
        index = SparseIndex.build(rows, show_progress=show_progress)
        return lambda queries, k: (
            index.search(queries, k) if _is_positive(queries) else sparse_search(queries, rows, k)
        )
    documents = rows.to(device)
    return lambda queries, k: sparse_search(queries.to(device), documents, k)


def _is_positive(rows: SparseRows) -> bool:
    """Return whether no value is negative, as where weights of terms were learned freely."""
    return not bool((rows.values < 0).any())


def _check_finite(vectors: SparseRows, chunk: Sequence[Judged]) -> None:
    """Raise ValueError if the vector of a query holds NaN or infinity."""
    bad_mask = ~vectors.values.isfinite().all(1)
    if bad_mask.any():
        query_id = chunk[int(bad_mask.nonzero()[0])].query_id
        raise ValueError(
            f"the encoder must give finite weights, got NaN or infinity for query {query_id!r}"
        )
