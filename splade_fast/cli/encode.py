"""`splade-fast encode`: encode a corpus into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from splade_fast.cli.errors import advise_to_resume, clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.cli.options import (
    Address,
    BatchSize,
    Device,
    Empty,
    EngineName,
    KeptEntries,
    MaxLength,
    Model,
    QueryModel,
    Resume,
    Scale,
    Workers,
    choose_engine,
    select_device,
)
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.encode_corpus import encode_corpus
from splade_fast.search.hits import count_empty_vectors
from splade_fast.search.index import Index
from splade_fast.search.models import load_document_encoder, load_own_query_encoder
from splade_fast.search.part_folder import PartFolder
from splade_fast.search.part_formats import PartFormat


def encode(
    corpus: Annotated[
        str, typer.Argument(help="File or folder of id<TAB>text lines, .jsonl or .parquet; or URL.")
    ],
    index: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    model: Model,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    chunk_size: Annotated[int, typer.Option(min=1, help="Documents encoded at a time.")] = 4096,
    device: Annotated[Device, typer.Option(help="Device of the model.")] = "cpu",
    engine: EngineName = "process",
    address: Address = None,
    workers: Workers = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="ray: threads of a worker; default: OMP_NUM_THREADS.")
    ] = None,
    resume: Resume = False,
    query_model: QueryModel = None,
    file_format: Annotated[
        Literal["index", PartFormat],
        typer.Option("--format", help="Content of the folder: an index, or numbered files."),
    ] = "index",
    empty: Empty = "keep",
    scale: Scale = None,
    store_texts: Annotated[
        bool, typer.Option("--store-texts", help="Store the texts too, in an export.")
    ] = False,
) -> None:
    """Encode a corpus into an index folder, or straight into the files of an export.

    An interrupted run keeps the documents that it has encoded, for a run with --resume.
    """
    with exit_with_2_on_bad_input(), clean_up_on_sigterm():
        chosen = choose_engine(
            engine, {"device": device}, address=address, workers=workers, threads=threads
        )
        if index.exists():
            raise FileExistsError(f"{index} must not exist yet")
        encoder = load_document_encoder(model)
        if engine == "process":  # else the workers move it, and this machine needs no GPU
            encoder.to(select_device(device))
        queries = load_own_query_encoder(model, query_model)
        work = (ChunkFolder if file_format == "index" else PartFolder).beside(index)
        with advise_to_resume(work, "encoded", should_resume=resume):
            count = encode_corpus(
                encoder,
                corpus,
                index,
                model=model,
                k=k,
                batch_size=batch_size,
                max_length=max_length,
                chunk_size=chunk_size,
                resume=resume,
                engine=chosen,
                query_model=queries[0] if queries is not None else None,
                query_encoder=queries[1] if queries is not None else None,
                file_format=file_format,
                empty=empty,
                scale=scale,
                store_texts=store_texts,
            )
        size = sum(file.stat().st_size for file in index.iterdir())
        unmatched = count_empty_vectors(Index.load(index).rows) if file_format == "index" else 0
        note = f", {unmatched} of them with empty vectors" if unmatched else ""
        typer.echo(f"{index}: {count} documents, {size / 2**20:.1f} MiB{note}")
