"""Errors, warnings and signals of the commands."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import typer

from splade_fast._distributed import OtherRankError
from splade_fast.search.lines import DataError, DataWarning
from splade_fast.search.ray_engine import EngineError


@contextmanager
def exit_with_2_on_bad_input() -> Iterator[None]:
    try:
        with _one_line_for_each_warning_of_data():
            yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        raise
    except (ImportError, OSError, ValueError, EngineError, OtherRankError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def refuse_torchrun(command: str) -> None:
    """Raise ValueError in one of several processes, which would write the same file.

    Args:
        command: name of the command.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ValueError(f"{command} must run in one process, got {count} of torchrun")


class FinishedWork(Protocol):
    """Folder with what an interrupted run has finished."""

    path: Path

    def has_finished(self) -> bool:
        """Return whether a run can go on with its content."""
        ...


@contextmanager
def advise_to_resume(work: FinishedWork, done: str, *, should_resume: bool) -> Iterator[None]:
    """Print how a run can go on after an error or a signal, earlier or inside the block.

    Args:
        work: folder of the run's finished work.
        done: participle for what is finished, such as "encoded".
        should_resume: whether this run goes on with an earlier one.
    """
    if not should_resume and work.has_finished():
        typer.echo(
            f"{work.path} holds what an interrupted run has {done}, which this run replaces; "
            "--resume would go on with it",
            err=True,
        )
    try:
        yield
    except DataError:  # of the data, or of chunks that this run cannot go on with
        raise
    except BaseException:
        if work.has_finished():
            typer.echo(
                f"{work.path} keeps what is {done}: --resume goes on with it, and a run "
                "without --resume starts again",
                err=True,
            )
        raise


@contextmanager
def clean_up_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that the program removes its unfinished files."""

    def leave(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _one_line_for_each_warning_of_data() -> Iterator[None]:
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, DataWarning):
                typer.echo(f"Warning: {message}", err=True)
            else:
                show_others(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
