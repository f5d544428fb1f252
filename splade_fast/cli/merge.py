"""`splade-fast merge`: merge checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splade_fast.cli.errors import clean_up_on_sigterm, exit_with_2_on_bad_input
from splade_fast.recipe.merge import Method, merge_checkpoints


def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    models: Annotated[list[str], typer.Argument(help="Folders or hub names of the models.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each model, in their order; default: 1.")
    ] = None,
    method: Annotated[
        Method,
        typer.Option(help="Mean of all models, or spherical interpolation between two."),
    ] = "average",
) -> None:
    """Merge the weights of models of one architecture, such as checkpoints of a training."""
    with exit_with_2_on_bad_input(), clean_up_on_sigterm():
        count = merge_checkpoints(models, out, weights=weight, method=method)
        typer.echo(f"{out}: {count} tensors of {len(models)} models")
