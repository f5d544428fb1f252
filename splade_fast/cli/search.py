"""`splade-fast search`: search an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast._checks import check_unicode
from splade_fast.cli.errors import exit_with_2_on_bad_input
from splade_fast.cli.options import BatchSize, OtherModel, QueryModel
from splade_fast.cli.queries import encode_queries
from splade_fast.ops.score import sparse_search
from splade_fast.search.hits import list_hits, warn_of_empty_vectors
from splade_fast.search.index import Index
from splade_fast.search.lines import parse_id
from splade_fast.search.models import load_query_encoder_of_index
from splade_fast.search.texts import DataError, Texts, read_texts


def search(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    query: Annotated[str | None, typer.Argument(help="Text of one query.")] = None,
    queries: Annotated[str | None, typer.Option(help="File of queries, instead of QUERY.")] = None,
    hits: Annotated[int, typer.Option(min=1, help="Documents shown for each query.")] = 10,
    terms: Annotated[int, typer.Option(min=0, help="Number of query terms shown.")] = 0,
    model: OtherModel = None,
    query_model: QueryModel = None,
    batch_size: BatchSize = 32,
) -> None:
    """Search an index and print lines `query id<TAB>rank<TAB>document id<TAB>score`.

    A document that shares no term with the query is no hit.
    """
    with exit_with_2_on_bad_input():
        if (query is None) == (queries is None):
            raise DataError("give either QUERY or --queries")
        if query is not None:
            check_unicode("QUERY", query)  # undecodable bytes arrive as lone surrogates
        texts = Texts(["query"], [query]) if query is not None else read_texts(str(queries))
        loaded = Index.load(index)
        encoder = load_query_encoder_of_index(loaded, model=model, query_model=query_model)
        vectors = encode_queries(encoder, texts, loaded.meta.max_length, batch_size)
        warn_of_empty_vectors(vectors, loaded.rows)
        listed = list_hits(*sparse_search(vectors, loaded.rows, hits))
        for document in {document for found in listed for document, _ in found}:
            parse_id(loaded.ids[document])  # an index of other programs may hold any text
        expansions = encoder.top_terms(vectors, terms) if terms else [{}] * len(texts)
        for query_id, expansion, found in zip(texts.ids, expansions, listed, strict=True):
            if expansion:
                shown = " ".join(f"{term}:{weight:.3f}" for term, weight in expansion.items())
                typer.echo(f"# {query_id}\t{shown}")
            for rank, (document, score) in enumerate(found, start=1):
                typer.echo(f"{query_id}\t{rank}\t{loaded.ids[document]}\t{score:.6f}")
