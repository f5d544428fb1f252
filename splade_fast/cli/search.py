"""`splade-fast search`: search an index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from splade_fast._checks import check_unicode
from splade_fast.cli.errors import clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.cli.options import BatchSize, Exhaustive, OtherModel, QueryModel
from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.hits import list_hits, warn_of_empty_vectors
from splade_fast.search.index import Index
from splade_fast.search.kept_index import KeptIndex
from splade_fast.search.lines import parse_id
from splade_fast.search.models import load_query_encoder_of_index
from splade_fast.search.queries import encode_queries
from splade_fast.search.shards import Shards, is_shard_folder
from splade_fast.search.texts import DataError, Texts, find_texts, read_texts

_SHOWN_CHARACTERS = 100  # of the text of a hit


def search(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    query: Annotated[str | None, typer.Argument(help="Text of one query.")] = None,
    queries: Annotated[str | None, typer.Option(help="File of queries, instead of QUERY.")] = None,
    hits: Annotated[int, typer.Option(min=1, help="Documents shown for each query.")] = 10,
    terms: Annotated[int, typer.Option(min=0, help="Number of query terms shown.")] = 0,
    model: OtherModel = None,
    query_model: QueryModel = None,
    batch_size: BatchSize = 32,
    corpus: Annotated[
        Path | None, typer.Option(help="File that was encoded, to show the beginnings of texts.")
    ] = None,
    exhaustive: Exhaustive = False,
) -> None:
    """Search an index and print lines `query id<TAB>rank<TAB>document id<TAB>score`.

    With --corpus, the beginning of the document's text follows. A document that shares no term
    with the query is no hit.

    The first search builds an index for fast searches in the folder, and later ones use it. A
    folder of `encode --format shards` has one.
    """
    with exit_with_2_on_bad_input():
        if (query is None) == (queries is None):
            raise DataError("give either QUERY or --queries")
        if query is not None:
            check_unicode("QUERY", query)  # undecodable bytes arrive as lone surrogates
        texts = Texts(["query"], [query]) if query is not None else read_texts(str(queries))
        loaded, search_all = _open(index, is_exhaustive=exhaustive)
        encoder = load_query_encoder_of_index(loaded, model=model, query_model=query_model)
        vectors = encode_queries(encoder, texts.texts, loaded.meta.max_length, batch_size)
        warn_of_empty_vectors(vectors, loaded.rows if isinstance(loaded, Index) else None)
        with clean_up_on_sigterm():
            listed = list_hits(*search_all(vectors, hits))
        found_ids = {loaded.ids[document] for found in listed for document, _ in found}
        for found_id in found_ids:
            parse_id(found_id)  # an index of other programs may hold any text
        shown_texts = {} if corpus is None else find_texts(corpus, found_ids)
        expansions = encoder.top_terms(vectors, terms) if terms else [{}] * len(texts)
        for query_id, expansion, found in zip(texts.ids, expansions, listed, strict=True):
            if expansion:
                shown = " ".join(f"{term}:{weight:.3f}" for term, weight in expansion.items())
                typer.echo(f"# {query_id}\t{shown}")
            for rank, (document, score) in enumerate(found, start=1):
                found_id = loaded.ids[document]
                text = f"\t{_shorten(shown_texts[found_id])}" if shown_texts else ""
                typer.echo(f"{query_id}\t{rank}\t{found_id}\t{score:.6f}{text}")


def _open(
    folder: Path, *, is_exhaustive: bool
) -> tuple[Index | Shards, Callable[[SparseRows, int], tuple[Tensor, Tensor]]]:
    """Return what a folder holds, and the function that searches it."""
    if is_shard_folder(folder):
        if is_exhaustive:
            raise DataError(f"--exhaustive must go with an index, got {folder} with shards")
        shards = Shards(folder, should_check=False)
        return shards, shards.search
    if is_exhaustive:
        index = Index.load(folder)
        return index, lambda queries, k: sparse_search(queries, index.rows, k)
    kept = KeptIndex(folder)
    return kept.index, kept.search


def _shorten(text: str) -> str:
    """Return the beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1].rstrip()}…"
