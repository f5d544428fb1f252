"""Limit of small work to the thread that calls for it.

To share a product of a few tokens with other threads takes longer than the product, and on a busy
machine such a thread may not run for milliseconds. torch.set_num_threads is no way out: it holds
for all threads of a process. OpenMP and MKL each have a number for the calling thread alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from splade_fast.encoders.threads import submodules

SMALL = 2**24  # multiplications; two threads need a third of a millisecond for these
_LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib")

SetThreads = Callable[[int], int]


def multiplications_per_token(model: nn.Module, vocab_size: int) -> int:
    """Return the multiplications of a token with all matrices that have no row for each term."""
    return sum(
        weight.numel()
        for module in submodules(model)
        for weight in module._parameters.values()
        if weight is not None and weight.ndim == 2 and weight.shape[0] < vocab_size
    )


@contextmanager
def in_this_thread(multiplications: int) -> Iterator[None]:
    """Let products in the block use the calling thread alone if they are small.

    The numbers of threads that `torch.set_num_threads` and the environment chose do not change, nor
    do those of other threads.
    """
    threads = torch.get_num_threads() if multiplications <= SMALL else 1
    functions = _functions() if threads > 1 else None
    if functions is None:
        yield
        return
    set_openmp, set_mkl = functions
    set_openmp(1)
    before = set_mkl(1)
    try:
        yield
    finally:
        set_mkl(before)
        set_openmp(threads)


@cache
def _functions() -> tuple[SetThreads, SetThreads] | None:
    """Return the functions that set the threads of the calling thread in OpenMP and in MKL.

    They are those that torch itself is linked to; None where torch has another pool of threads.
    """
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    folder = Path(torch.__file__).parent / "lib"
    paths = [path for name in _LIBRARIES if (path := folder / name).exists()]
    if not paths:
        return None
    library = ctypes.PyDLL(str(paths[0]))  # keeps the GIL, which these calls are too short to drop
    try:
        set_openmp = library.omp_set_num_threads
    except AttributeError:
        return None
    set_openmp.restype = None
    return set_openmp, getattr(library, "MKL_Set_Num_Threads_Local", lambda number: number)
