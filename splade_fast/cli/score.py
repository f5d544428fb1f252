"""`splade-fast score`: write teachers' scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from splade_fast.cli.errors import (
    advise_to_resume,
    clean_up_on_sigterm,
    exit_with_2_on_bad_input,
    refuse_torchrun,
)
from splade_fast.cli.options import BatchSize, Device, MaxLength, Resume, select_device
from splade_fast.recipe.lists import iterate_lists
from splade_fast.recipe.part_files import PartFiles
from splade_fast.recipe.score import Normalization, score_with_teachers
from splade_fast.recipe.teachers import BM25, EncoderTeacher, Teacher, load_teacher
from splade_fast.search.index import Index
from splade_fast.search.models import is_index_of
from splade_fast.search.texts import DataError, Texts, read_texts


def score(
    source: Annotated[
        Path, typer.Argument(help="Queries with documents, as written by `mine`, or triples.")
    ],
    out: Annotated[Path, typer.Argument(help="File to write, of JSON lines; must not exist.")],
    teacher: Annotated[
        list[str],
        typer.Option(
            help="bm25, or hub name or folder of a CrossEncoder, SparseEncoder, "
            "SentenceTransformer or SPLADE model; repeat for an ensemble."
        ),
    ],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each teacher, in their order; default: 1.")
    ] = None,
    normalize: Annotated[
        Normalization | None,
        typer.Option(
            help="Normalization over the documents of a query; default: none for one teacher, "
            "min-max for several."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor of the mean of the teachers.")] = 1.0,
    queries: Annotated[
        Path | None, typer.Option(help="Texts of the queries, if SOURCE holds ids alone.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Documents that bm25 counts the terms of, and texts, if SOURCE holds ids alone."
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="Index of --corpus by one of the SPLADE teachers, which then encodes no document."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 256,
    chunk_size: Annotated[int, typer.Option(min=1, help="Lists scored at a time.")] = 1024,
    device: Annotated[Device, typer.Option(help="Device of the teachers.")] = "cpu",
    resume: Resume = False,
) -> None:
    """Write scores of one or several teachers, for the losses margin_mse and kl of `train`.

    A score is scale · the weighted mean of the teachers' normalized scores.
    """
    with exit_with_2_on_bad_input():
        refuse_torchrun("score")
        query_texts = None if queries is None else read_texts(queries)
        documents = None if corpus is None else read_texts(corpus)
        place = select_device(device)
        counted = _list_documents(source, documents) if BM25 in teacher else None
        teachers = [
            load_teacher(
                name, corpus=counted, device=place, batch_size=batch_size, max_length=max_length
            )
            for name in teacher
        ]
        if index is not None:
            _use_index(teachers, index, documents)
        with (
            clean_up_on_sigterm(),
            advise_to_resume(PartFiles(out), "scored", should_resume=resume),
        ):
            report = score_with_teachers(
                source,
                out,
                teachers,
                weights=weight,
                normalize=normalize,
                scale=scale,
                queries=query_texts,
                corpus=documents,
                chunk_size=chunk_size,
                resume=resume,
            )
        for line in report.lines():
            typer.echo(line)


def _use_index(teachers: Sequence[Teacher], index: Path, corpus: Texts | None) -> None:
    """Give an index of the corpus to the teachers whose encoder made it.

    Raises:
        DataError: there is no corpus or no such teacher.
        OSError, ValueError: see `EncoderTeacher.use_index`.
    """
    if corpus is None:
        raise DataError("--index needs --corpus")
    meta = Index.load(index).meta
    own = [one for one in teachers if isinstance(one, EncoderTeacher)]
    fitting = [one for one in own if is_index_of(one.encoder, meta)]
    if not fitting:
        raise DataError(f"--index must be of a SPLADE teacher, got that of {meta.model}")
    for one in fitting:
        one.use_index(index, corpus)


def _list_documents(source: Path, corpus: Texts | None) -> list[str]:
    """Return the documents whose terms BM25 counts: those of the corpus, else of the lists."""
    if corpus is not None:
        return corpus.texts
    return [text for found in iterate_lists(source) for text in found.documents]
