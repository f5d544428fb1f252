"""The kernels of the head on a GPU, chosen by name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import splade_fast

_SWITCH = "SPLADE_FAST_HOPPER"


def run_head(name: str, *arguments: Any, **options: Any) -> Tensor:
    """Run splade_head by one kernel.

    Args:
        name: "chunked" (every GPU), "fused" or "screened" (compute capability 9.0).
        arguments, options: see splade_head.
    """
    algorithm = "screened" if name == "screened" else "dense"
    with _hopper_kernels("0" if name == "chunked" else "1"):
        return splade_fast.splade_head(*arguments, algorithm=algorithm, **options)


@contextmanager
def _hopper_kernels(switch: str) -> Iterator[None]:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = switch
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
