"""`python -m splade_fast` is `splade-fast`, which torchrun can start as well."""

from splade_fast.cli import app

app(prog_name="splade-fast")
