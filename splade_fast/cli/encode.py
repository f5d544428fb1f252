"""`splade-fast encode`: encode a corpus into an index folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast._distributed import fail_together, join_torchrun
from splade_fast.cli.errors import advise_to_resume, clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.cli.options import (
    BatchSize,
    Device,
    KeptEntries,
    MaxLength,
    Model,
    QueryModel,
    Resume,
    select_device,
)
from splade_fast.search.chunk_folder import ChunkFolder
from splade_fast.search.encode_corpus import encode_corpus
from splade_fast.search.hits import count_empty_vectors
from splade_fast.search.index import Index
from splade_fast.search.models import load_document_encoder, load_own_query_encoder


def encode(
    corpus: Annotated[Path, typer.Argument(help="File of id<TAB>text lines, or .jsonl file.")],
    index: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    model: Model,
    k: KeptEntries = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    chunk_size: Annotated[int, typer.Option(min=1, help="Documents encoded at a time.")] = 4096,
    device: Annotated[Device, typer.Option(help="cuda: one GPU for each process.")] = "cpu",
    resume: Resume = False,
    query_model: QueryModel = None,
) -> None:
    """Encode a corpus into an index folder.

    An interrupted run keeps the documents that it has encoded, for a run with --resume.

    Several processes share the work under torchrun: torchrun -m splade_fast encode ...
    """
    with exit_with_2_on_bad_input():
        with clean_up_on_sigterm(), join_torchrun() as rank:
            with fail_together("loading the model"):
                if index.exists():
                    raise FileExistsError(f"{index} must not exist yet")
                encoder = load_document_encoder(model).to(select_device(device))
                queries = load_own_query_encoder(model, query_model)
            with advise_to_resume(
                ChunkFolder.beside(index), "encoded", is_first=rank == 0, should_resume=resume
            ):
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
                    query_model=queries[0] if queries is not None else None,
                    query_encoder=queries[1] if queries is not None else None,
                )
        if rank == 0:
            size = sum(file.stat().st_size for file in index.iterdir())
            empty = count_empty_vectors(Index.load(index).rows)
            note = f", {empty} of them with empty vectors" if empty else ""
            typer.echo(f"{index}: {count} documents, {size / 2**20:.1f} MiB{note}")
