"""`splade-fast evaluate`: measure a model on judged queries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast.cli.errors import exit_with_2_on_bad_input
from splade_fast.cli.options import BatchSize, KeptEntries, OtherModel, QueryModel
from splade_fast.cli.queries import encode_queries
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.search.encode_corpus import check_vocabularies
from splade_fast.search.index import Index, IndexMeta, resolve_model
from splade_fast.search.models import (
    load_document_encoder,
    load_own_query_encoder,
    load_query_encoder_of_index,
)
from splade_fast.search.texts import DataError, Texts, read_qrels, read_texts


def evaluate(
    queries: Annotated[Path, typer.Option(help="File of queries.")],
    qrels: Annotated[Path, typer.Option(help="File of judgements, TREC or BEIR format.")],
    index: Annotated[Path | None, typer.Option(help="Folder written by `encode`.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Corpus, instead of an index.")] = None,
    model: OtherModel = None,
    query_model: QueryModel = None,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens kept of each text; default: 256."),
    ] = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids",
            help="Do not search the document that has the id of the query, as in BEIR.",
        ),
    ] = False,
) -> None:
    """Print MRR@10, nDCG@10 and Recall@100 of a model on a corpus or an index."""
    from splade_fast.search.evaluation import evaluate_vectors, select_judged, select_qrels

    with exit_with_2_on_bad_input():
        if (index is None) == (corpus is None):
            raise DataError("give either --index or --corpus")
        if index is not None and (k is not None or max_length is not None):
            raise DataError("give --k and --max-length with --corpus; an index has its own")
        judgements = read_qrels(qrels)
        judged = select_judged(read_texts(queries), judgements)
        if index is not None:
            searched = Index.load(index)
            judgements = select_qrels(judgements, judged.ids, searched.ids)
            encoder = load_query_encoder_of_index(searched, model=model, query_model=query_model)
        else:
            if model is None:
                raise DataError("give --model with --corpus")
            texts = read_texts(str(corpus))
            judgements = select_qrels(judgements, judged.ids, texts.ids)
            documents = load_document_encoder(model)
            queries_of_model = load_own_query_encoder(model, query_model)
            encoder = documents if queries_of_model is None else queries_of_model[1]
            check_vocabularies(documents, encoder)
            searched = _build_index(documents, texts, model, k, batch_size, max_length or 256)
        vectors = encode_queries(encoder, judged, searched.meta.max_length, batch_size)
        measures = evaluate_vectors(
            judgements,
            judged.ids,
            vectors,
            searched.ids,
            searched.rows,
            ignore_identical_ids=ignore_identical_ids,
        )
        for name, value in measures.items():
            typer.echo(f"{name}\t{value:.4f}")


def _build_index(
    encoder: TextEncoder,
    texts: Texts,
    model: str,
    k: int | None,
    batch_size: int,
    max_length: int,
) -> Index:
    rows = encoder.encode(
        texts.texts,
        k=k,
        batch_size=batch_size,
        max_length=max_length,
        prompt_name=encoder.settings.prompt_for("document"),
    )
    return Index(rows, texts.ids, IndexMeta(resolve_model(model), max_length, k))
