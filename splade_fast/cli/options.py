"""Options that several commands share."""

from __future__ import annotations

import os
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
KeptEntries = Annotated[
    int | None, typer.Option("--k", min=1, help="Keep the k largest entries of a vector.")
]

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an interrupted run has finished.")
]

Device = Literal["cpu", "cuda"]


def select_device(kind: Device) -> torch.device:
    """Return the CPU, or the GPU with the number that torchrun gave this process."""
    if kind == "cpu":
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"--device cuda must have a GPU for each process, got {count} for LOCAL_RANK {number}"
        )
    return torch.device("cuda", number)
