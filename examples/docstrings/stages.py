"""Console of the demo, and the stages that it shows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print a title, and after the block the seconds that it took."""
    console.print(f"[bold]{title}[/bold] …")
    start = time.perf_counter()
    yield
    console.print(f"  {time.perf_counter() - start:.1f} s")
