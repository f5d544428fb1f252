"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import typer

from splade_fast.export.formats import EmptyDocuments
from splade_fast.search.ray_engine import RayEngine

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

Workers = Annotated[
    int | None, typer.Option(min=1, help="ray: number of workers; default: all GPUs or CPUs.")
]
Address = Annotated[str | None, typer.Option(help="ray: address of the cluster, such as auto.")]
EngineName = Annotated[
    Literal["process", "ray"],
    typer.Option("--engine", help="ray: workers on a Ray cluster, or on this machine."),
]

Empty = Annotated[EmptyDocuments, typer.Option(help="Documents without entries, in an export.")]
Scale = Annotated[
    float | None,
    typer.Option(help="anserini: impact = round(scale * weight); default: 100."),
]

Exhaustive = Annotated[
    bool,
    typer.Option("--exhaustive", help="Read all documents, and neither use nor build an index."),
]

Device = Literal["cpu", "cuda"]


def choose_engine(
    name: Literal["process", "ray"], defaults: dict[str, Any], **settings: Any
) -> Literal["process"] | RayEngine:
    """Return an engine with the settings that only one for Ray has.

    Args:
        name: name of the engine.
        defaults: further settings of an engine for Ray.
        settings: options of the command line.
    """
    if name == "ray":
        return RayEngine(**defaults, **settings)
    for option, value in settings.items():
        if value is not None:
            raise ValueError(f"--{option} must go with --engine ray, got --engine {name}")
    return "process"


def select_device(kind: Device) -> torch.device:
    """Return the device of a name, if torch finds one."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where torch finds no GPU, got cuda")
    return torch.device(kind)
