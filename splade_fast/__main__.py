"""Run the command line tool as `python -m splade_fast`, which torchrun can start."""

from splade_fast.cli import app

app(prog_name="splade-fast")
