"""Sparse rows with the statistics of really encoded documents, in any number.

A sample of the demo's corpus (docstrings of the installed packages, and their summaries as
queries) is encoded with the demo's checkpoint, once for these versions of the packages; the
vectors stay in a cache folder of the user. Documents are then drawn from them: the number of terms
of one is that of a random encoded document; its terms are drawn with probabilities proportional to
their document frequencies, a repeated draw counting once; and each weight is one that the term has
in a random encoded document with it. So lengths and weights are those of real vectors, and document
frequencies nearly (a term of two thirds of the encoded documents is in half of the drawn ones). The
terms of a document do not go together as those of a real one do, which is nothing to an exact
search; one that clusters similar documents finds little to cluster.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs.cache_folder import cache_folder
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import docstring_pairs
from examples.docstrings.task import docstring_task
from splade_fast import SparseRows
from splade_fast.encoders.splade import SpladeEncoder

_DOCUMENTS = 4000
_QUERIES = 256
_MAX_LENGTH = 256
_DRAWS_PER_TERM = 2  # enough for as many different terms, but in a few rows in a thousand
_ROWS_AT_ONCE = 1 << 14


def encoded_sample(
    k: int | None,
    cache: Path | None = None,
    *,
    limit: int | None = _DOCUMENTS,
    num_queries: int = _QUERIES,
) -> tuple[SparseRows, SparseRows]:
    """Return really encoded queries, and documents with their k largest entries.

    Args:
        k: number of entries kept of a document; None keeps all.
        cache: folder of the vectors; by default that of the user.
        limit: number of documents; None takes all docstrings.
        num_queries: number of queries.

    Raises:
        CheckpointError: the demo's checkpoint cannot be fetched.
    """
    settings = f"{limit} {num_queries} {_MAX_LENGTH} {k}"
    folder = cache_folder("encoded", DEMO.requirement, settings, cache)
    queries, documents = folder / "queries.safetensors", folder / "documents.safetensors"
    if not documents.exists():
        encoder = SpladeEncoder.from_pretrained(str(DEMO.fetch()))
        task = docstring_task(docstring_pairs(), limit, num_queries)
        assert task.queries is not None
        folder.mkdir(parents=True, exist_ok=True)
        encoder.encode(task.queries.texts, max_length=_MAX_LENGTH, show_progress=False).save(
            queries
        )
        encoder.encode(task.documents.texts, k=k, max_length=_MAX_LENGTH, show_progress=False).save(
            documents
        )
    return SparseRows.load(queries), SparseRows.load(documents)


def resampled(documents: SparseRows, count: int, seed: int) -> SparseRows:
    """Draw `count` rows from the statistics of `documents`, which must have some entries."""
    _, columns, values = (tensor.numpy() for tensor in documents.coordinates())
    lengths = documents.lengths.numpy()
    parts = _drawn(columns, values, lengths, documents.width, count, np.random.default_rng(seed))
    indices = torch.empty(count, documents.width, dtype=torch.int32)
    weights = torch.empty(count, documents.width, dtype=documents.dtype)
    start = 0
    for part_indices, part_weights in parts:
        rows = slice(start, start + len(part_indices))
        indices[rows] = torch.from_numpy(part_indices)
        weights[rows] = torch.from_numpy(part_weights)
        start = rows.stop
    used = (indices >= 0).sum(1, dtype=torch.int32)
    return SparseRows(indices, weights, used, documents.num_cols)


def _drawn(
    columns: np.ndarray,
    values: np.ndarray,
    lengths: np.ndarray,
    width: int,
    count: int,
    random: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield padded indices and weights of some rows at a time.

    A random entry of all encoded documents has a term by its document frequency, and one of the
    weights of that term.
    """
    draws = _DRAWS_PER_TERM * width
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, count - start)
        entries = random.integers(len(columns), size=(rows, draws), dtype=np.int32)
        # By term, and of equal terms in the order drawn.
        drawn = np.sort(columns[entries] * draws + np.arange(draws), axis=1)
        terms, turns = np.divmod(drawn, draws)
        turns[:, 1:][terms[:, 1:] == terms[:, :-1]] = draws  # repeated
        wanted = random.choice(lengths, rows)
        last = np.take_along_axis(
            np.sort(turns, axis=1), np.maximum(wanted, 1)[:, None] - 1, axis=1
        )
        kept = (turns <= np.minimum(last, draws - 1)) & (wanted > 0)[:, None]
        # The kept ones to the front, still by term.
        places = np.sort(np.where(kept, np.arange(draws), draws), axis=1)[:, :width]
        unused = places == draws
        places[unused] = 0
        indices = np.take_along_axis(terms, places, axis=1).astype(np.int32)
        chosen = np.take_along_axis(entries, np.take_along_axis(turns, places, axis=1) % draws, 1)
        yield np.where(unused, -1, indices), np.where(unused, 0, values[chosen])
