"""`splade-fast export`: write an index for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from splade_fast.cli.errors import advise_to_resume, clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.cli.options import (
    Address,
    Empty,
    EngineName,
    Resume,
    Scale,
    Workers,
    choose_engine,
)
from splade_fast.export.export_index import export_index
from splade_fast.export.export_parts import export_parts
from splade_fast.export.formats import ExportFormat
from splade_fast.search.index import Index
from splade_fast.search.part_folder import PartFolder
from splade_fast.search.part_formats import PartFormat

_PART_SIZE = 65_536


def export(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    file_format: Annotated[
        Literal[ExportFormat, "shards"], typer.Option("--format", help="Reader of the folder.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Source of token names; default: the index's model."),
    ] = None,
    empty: Empty = "keep",
    scale: Scale = None,
    part_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents of a file; default: all, or 65536 with shards, ray or --resume.",
        ),
    ] = None,
    engine: EngineName = "process",
    address: Address = None,
    workers: Workers = None,
    resume: Resume = False,
) -> None:
    """Write an index in the format of a search engine, vector store or library.

    With --part-size, or --engine ray, the folder holds numbered files of some documents each. An
    interrupted run keeps the files that it has finished, for a run with --resume.
    """
    with exit_with_2_on_bad_input(), clean_up_on_sigterm():
        # A writer uses one thread.
        chosen = choose_engine(engine, {"threads": 1}, address=address, workers=workers)
        if out.exists():
            raise FileExistsError(f"{out} must not exist yet")
        if part_size is None and not resume and engine == "process" and file_format != "shards":
            count = export_index(Index.load(index), out, file_format, model, empty, scale)
        else:
            with advise_to_resume(PartFolder.beside(out), "exported", should_resume=resume):
                count = export_parts(
                    index,
                    out,
                    cast(PartFormat, file_format),  # export_parts refuses bm25s
                    model=model,
                    empty=empty,
                    scale=scale,
                    part_size=part_size or _PART_SIZE,
                    engine=chosen,
                    resume=resume,
                )
        typer.echo(f"{out}: {count} documents")
