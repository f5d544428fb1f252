"""Work on items one by one, by this process or by workers of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal

import torch.distributed as dist
from tqdm.auto import tqdm

from splade_fast._distributed import is_distributed
from splade_fast.search.ray_engine import I, R, RayEngine, Work

Engine = Literal["process", "ray"] | RayEngine


@contextmanager
def working(
    engine: Engine,
    work: Work[I, R],
    items: Sequence[I],
    *,
    device: str = "cpu",
    show_progress: bool = True,
) -> Iterator[Iterator[tuple[I, R]]]:
    """Give the block an iterator over all items and the results of their work, as they finish.

    Args:
        engine: "process", "ray" or a `RayEngine`.
        work: function of an item, and of a function to call with the number of texts done.
        items: the items.
        device: device of the workers, where the engine names none.
        show_progress: draw a progress bar.

    Raises:
        ValueError: there is no such engine.
    """
    run: _Run[I, R] = _choose(engine)
    total = sum(item.count for item in items)
    with (
        tqdm(total=total, unit="text", disable=not show_progress) as progress,
        closing(run(work, items, progress.update, device)) as results,
    ):
        yield results


def check_engine(engine: Engine) -> None:
    """Raise ValueError if there is no such engine, or this process is not the first of torchrun.

    Only one process may write the files.
    """
    _choose(engine)
    rank = dist.get_rank() if is_distributed() else int(os.environ.get("RANK", "0"))
    if rank > 0:
        raise ValueError(
            "engine must be 'ray' to encode with several processes, in a program that is started "
            f"once, got a call on rank {rank} of torchrun"
        )


_Run = Callable[[Work[I, R], Sequence[I], Callable[[int], object], str], Generator[tuple[I, R]]]


def _choose(engine: Engine) -> _Run[I, R]:
    if isinstance(engine, RayEngine):
        return engine.run
    if engine not in ("process", "ray"):
        raise ValueError(f"engine must be 'process', 'ray' or a RayEngine, got {engine!r}")
    return RayEngine().run if engine == "ray" else _run_here


def _run_here(
    work: Work[I, R], items: Sequence[I], after_texts: Callable[[int], object], device: str
) -> Generator[tuple[I, R]]:
    for item in items:
        yield item, work(item, after_texts)
