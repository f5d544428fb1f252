"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import typer

Model = Annotated[str, typer.Option(help="Hub name or folder of a SPLADE model.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Model; default: the index's.")]
QueryModel = Annotated[
    str | None,
    typer.Option(
        help="Model for queries; default: the one that was trained with the model, else the model."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of texts per batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Number of tokens kept of each text.")]
ChosenLength = Annotated[
    int | None, typer.Option(min=1, help="Number of tokens kept of each text; default: 256.")
]
KeptEntries = Annotated[
    int | None, typer.Option("--k", min=1, help="Keep the k largest entries of a vector.")
]

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an interrupted run has finished.")
]

Exhaustive = Annotated[
    bool,
    typer.Option("--exhaustive", help="Read all documents, and neither use nor build an index."),
]

Device = Literal["cpu", "cuda"]


def select_device(kind: Device) -> torch.device:
    """Return the device of a name, if torch finds one."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where torch finds no GPU, got cuda")
    return torch.device(kind)
