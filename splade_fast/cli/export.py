"""`splade-fast export`: write an index for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast.cli.errors import exit_with_2_on_bad_input
from splade_fast.export.export_index import EmptyDocuments, ExportFormat, export_index
from splade_fast.search.index import Index


def export(
    index: Annotated[Path, typer.Argument(help="Folder written by `encode`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    file_format: Annotated[ExportFormat, typer.Option("--format", help="Reader of the folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Source of token names; default: the index's model."),
    ] = None,
    empty: Annotated[EmptyDocuments, typer.Option(help="Documents without entries.")] = "keep",
    scale: Annotated[
        float | None,
        typer.Option(help="anserini: impact = round(scale * weight); default: 100."),
    ] = None,
) -> None:
    """Write an index in the format of a search engine, vector store or library."""
    with exit_with_2_on_bad_input():
        if out.exists():
            raise FileExistsError(f"{out} must not exist yet")
        count = export_index(Index.load(index), out, file_format, model, empty, scale)
        typer.echo(f"{out}: {count} documents")
