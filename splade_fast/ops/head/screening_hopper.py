"""The screened head on Hopper: where it runs, and its prepared weight, without waiting for the GPU.

Unlike on the CPU nobody looks at the weight's values here: the kernel compares one element of every
row with what it was, and takes the dense product where one has changed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from splade_fast import _library
from splade_fast._checks import POOLINGS
from splade_fast.ops.head.screening import (
    MAX_DIM,
    MEAN_TOKENS,
    Decoder,
    PreparedWeight,
    gives_better_mean,
    usable_mean,
)

_DIM_UNIT = 8  # rows of 16 bytes


def check_runs(hidden: Tensor, pooling: int) -> None:
    """Raises NotImplementedError, which says why, where it cannot run or was not asked for."""
    reason = None
    if os.environ.get("SPLADE_FAST_HOPPER") != "1":
        reason = "has not run there yet and has to be asked for with SPLADE_FAST_HOPPER=1"
    elif pooling != POOLINGS["max"]:
        reason = 'pools by "max" alone'
    elif hidden.dtype not in (torch.bfloat16, torch.float16):
        reason = f"takes bfloat16 or float16, got {hidden.dtype}"
    elif hidden.shape[-1] % _DIM_UNIT != 0 or hidden.shape[-1] > MAX_DIM:
        dim = hidden.shape[-1]
        reason = f"takes at most {MAX_DIM} dimensions, a multiple of {_DIM_UNIT}, got {dim}"
    elif "head_sm90a" not in _library.build_info()["built"]["cuda_kernels"]:
        reason = "was built without sm_90a"
    elif (capability := torch.cuda.get_device_capability(hidden.device)) != (9, 0):
        reason = "needs compute capability 9.0, found {}.{}".format(*capability)
    if reason is not None:
        raise NotImplementedError(
            f'algorithm="screened" on a GPU {reason}; use "auto" or "dense" instead'
        )


def prepare(
    decoder: Decoder, weight: Tensor, source: Tensor, hidden: Tensor, counts: Tensor | None
) -> PreparedWeight:
    """The weight as it is now, in int8; made again where it has changed, which nobody waits for."""
    version = _version(source)
    tokens = hidden.numel() // hidden.shape[-1]  # how many count only the GPU knows
    old = decoder.prepared
    if old is not None and old.version == version and not gives_better_mean(tokens, old.tokens):
        return old
    mean = _mean(hidden, counts)
    packed, rows = torch.ops.splade_fast.head_prepare(weight, mean)
    prepared = PreparedWeight(mean, packed, rows, None, tokens, version)
    if version is not None:
        decoder.prepared = prepared
    return prepared


def _version(source: Tensor) -> object:
    """Equal only while what was prepared holds; None: it is for this call alone.

    The stream is part of it, because on another one it may not be ready yet. A graph prepares its
    own: it would go on reading what is kept here after that has been replaced.
    """
    if source.is_inference() or torch.cuda.is_current_stream_capturing():
        return None
    return source._version, torch.cuda.current_stream(source.device).cuda_stream


def _mean(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """About the mean of the tokens that count: of those among the first rows."""
    rows = hidden.flatten(0, -2)[:MEAN_TOKENS].float()
    if counts is None:
        return usable_mean(rows.mean(0))
    kept = counts.flatten()[:MEAN_TOKENS, None]
    return usable_mean(torch.where(kept, rows, 0.0).sum(0) / kept.sum().clamp_min(1))
