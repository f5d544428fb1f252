"""Errors, warnings and signals of the commands."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from splade_fast._distributed import OtherRankError
from splade_fast.search.lines import DataWarning


@contextmanager
@contextmanager
def exit_with_2_on_bad_input() -> Iterator[None]:
    try:
        with _one_line_for_each_warning_of_data():
            yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        raise
    except (ImportError, OSError, ValueError, OtherRankError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
@contextmanager
def clean_up_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that the program removes its unfinished files.

    torchrun sends SIGTERM to the other processes when one has died.
    """

    def leave(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
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
