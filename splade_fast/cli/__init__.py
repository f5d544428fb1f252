"""Command line: each command is a function in the file of its name."""

import typer

from splade_fast.cli.encode import encode
from splade_fast.cli.evaluate import evaluate
from splade_fast.cli.export import export
from splade_fast.cli.merge import merge
from splade_fast.cli.mine import mine
from splade_fast.cli.score import score
from splade_fast.cli.search import search
from splade_fast.cli.selftest import info, selftest
from splade_fast.cli.train import train

__all__ = [
    "app",
    "encode",
    "evaluate",
    "export",
    "info",
    "merge",
    "mine",
    "score",
    "search",
    "selftest",
    "train",
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Learned sparse retrieval: encode, search, evaluate and train with SPLADE models.",
)

app.command()(encode)
app.command()(search)
app.command()(evaluate)
# The command parses its own flags, which are the fields of several dataclasses.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(train)
app.command()(mine)
app.command()(score)
app.command()(merge)
app.command()(export)
app.command()(info)
app.command()(selftest)
