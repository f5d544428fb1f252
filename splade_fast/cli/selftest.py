"""`splade-fast info` and `splade-fast selftest`: the state of an installation."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from splade_fast._library import build_info
from splade_fast.cli.errors import exit_with_2_on_bad_input
from splade_fast.cli.options import Device, select_device


def info() -> None:
    """Print the compiled architectures, the loaded libraries, and reasons for missing ones."""
    for name, value in build_info().items():
        typer.echo(f"{name}: {value}")


def selftest(
    device: Annotated[Device, typer.Option(help="Device of the ops.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write, for a bug report.")
    ] = None,
) -> None:
    """Compare every op in every dtype with plain PyTorch, in error and time.

    Exit with 1 if an op is wrong.
    """
    from splade_fast.selftest import run_selftest

    outcomes = []
    with exit_with_2_on_bad_input():
        for outcome in run_selftest(select_device(device)):
            typer.echo(outcome.line)
            outcomes.append(outcome)
        wrong = [outcome for outcome in outcomes if not outcome.is_passed]
        if json_file is not None:
            report = {
                "build": build_info(),
                "platform": platform.platform(),
                "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
                "is_passed": not wrong,
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if wrong:
        typer.echo(f"{len(wrong)} of {len(outcomes)} results are wrong", err=True)
        raise typer.Exit(1)
    typer.echo(f"all {len(outcomes)} results are right")
