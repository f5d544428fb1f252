"""`splade-fast train`: train an encoder."""

from __future__ import annotations

import typer

from splade_fast.cli.errors import exit_with_2_on_bad_input


def train(context: typer.Context) -> None:
    """Train an encoder with options from a YAML file and flags; see `train --help`."""
    with exit_with_2_on_bad_input():
        from splade_fast.training.command import train as run

        message = run(context.args)
    if message is not None:
        typer.echo(message)
