"""Contenders in a process each: threads of one engine wait for work for a while after each call.

In one process, or at the same time, they would take the cores from the next contender.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import splade_fast as sf
from benchmarks.harness.timing import CpuClock, garbage_collection_off
from benchmarks.studies.engines.contenders import BODIES, CONTENDERS, reason

CONTEXT: Any = multiprocessing.get_context("spawn")


class ContenderProcess:
    """Process that loads a contender and encodes on request."""

    def __init__(self, name: str, model: str, folder: Path, threads: int) -> None:
        self._connection, there = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=_serve, args=(there, name, model, folder, threads), daemon=True
        )
        self._process.start()
        there.close()

    def wait_until_loaded(self) -> str | None:
        """Return None, or why the contender cannot be loaded here."""
        try:
            missing: str | None = self._connection.recv()
        except EOFError:
            self._process.join()
            return f"its process ended with {self._process.exitcode}"
        return missing

    def encode(self, texts: Sequence[str], batch_size: int) -> sf.SparseRows:
        self._connection.send(("encode", list(texts), batch_size))
        indices, values, lengths, num_cols = self._connection.recv()
        tensors = [torch.from_numpy(array) for array in (indices, values, lengths)]
        return sf.SparseRows(tensors[0], tensors[1], tensors[2], num_cols)

    def times(self, calls: Sequence[Sequence[str]], batch_size: int) -> list[float]:
        """Return the milliseconds of calls that encode some texts each."""
        self._connection.send(("times", list(calls), batch_size))
        milliseconds: list[float] = self._connection.recv()
        return milliseconds

    def end(self) -> None:
        with suppress(BrokenPipeError):  # it has ended
            self._connection.send(None)
        self._process.join()


@contextmanager
def running(
    names: Iterable[str], model: str, folder: Path, threads: int
) -> Iterator[dict[str, ContenderProcess]]:
    """Run the contenders that this machine has, and print why others are missing."""
    started = {name: ContenderProcess(name, model, folder, threads) for name in names}
    try:
        missing = {name: process.wait_until_loaded() for name, process in started.items()}
        for name, why in missing.items():
            if why is not None:
                print(f"without {name}: {why}", flush=True)
        yield {name: started[name] for name, why in missing.items() if why is None}
    finally:
        for process in started.values():
            process.end()


def _serve(connection: Connection, name: str, model: str, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        encode = (CONTENDERS | BODIES)[name](model, folder)
        encode(["a text"], 1)  # some faults of an engine show in its first product
    except Exception as error:  # engines fail in their own ways, none of which stops the others
        connection.send(reason(error))
        return
    connection.send(None)
    clock = CpuClock()
    while True:
        message = connection.recv()
        if message is None:
            return
        request, texts, batch_size = message
        if request == "encode":
            rows = _to_rows(encode(texts, batch_size))
            arrays = (rows.indices.numpy(), rows.values.numpy(), rows.lengths.numpy())
            connection.send((*arrays, rows.num_cols))
            continue
        with garbage_collection_off():
            calls = [partial(encode, call, batch_size) for call in texts]
            connection.send([clock.milliseconds(clock.mark(call)) for call in calls])


def _to_rows(vectors: sf.SparseRows | Tensor) -> sf.SparseRows:
    if isinstance(vectors, sf.SparseRows):
        return vectors
    return sf.SparseRows.from_torch_csr(vectors.coalesce().to_sparse_csr())
