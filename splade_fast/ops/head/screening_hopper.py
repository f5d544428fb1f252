"""Screened head on Hopper: where it is supported, and its prepared weight.

Nothing here waits for the GPU. Unlike on the CPU, the values of the weight are not sampled: the
kernel compares one element of every row with its earlier value, and computes the dense product if
one has changed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from splade_fast import _library
from splade_fast._checks import POOLINGS
from splade_fast._distributed import is_distributed
from splade_fast.ops.head.screening import (
    MAX_DIM,
    MEAN_TOKENS,
    PreparedWeight,
    ScreeningState,
    is_better_mean,
    replace_unusable,
)

_DIM_UNIT = 8  # the size of a row is a multiple of 16 bytes


def check_supported(hidden: Tensor, pooling: int) -> None:
    """Raise NotImplementedError with the reason if the product is not supported or not enabled."""
    reason = None
    if os.environ.get("SPLADE_FAST_HOPPER") != "1":
        reason = "has not run there yet and must be enabled with SPLADE_FAST_HOPPER=1"
    elif pooling != POOLINGS["max"]:
        reason = 'supports pooling="max" only'
    elif hidden.dtype not in (torch.bfloat16, torch.float16):
        reason = f"needs bfloat16 or float16, got {hidden.dtype}"
    elif hidden.shape[-1] % _DIM_UNIT != 0 or hidden.shape[-1] > MAX_DIM:
        dim = hidden.shape[-1]
        reason = f"needs at most {MAX_DIM} dimensions, a multiple of {_DIM_UNIT}, got {dim}"
    elif not _library.has_cuda_kernels("head_sm90a"):
        reason = "was built without sm_90a"
    elif (capability := _library.cuda_capability(hidden.get_device())) != (9, 0):
        reason = "needs compute capability 9.0, found {}.{}".format(*capability)
    if reason is not None:
        raise NotImplementedError(
            f'algorithm="screened" on a GPU {reason}; use "auto" or "dense" instead'
        )


def prepare(
    state: ScreeningState,
    weight: Tensor,
    source: Tensor,
    hidden: Tensor,
    attention_mask: Tensor | None,
) -> PreparedWeight:
    """Return the prepared weight; queue preparing it again if the weight has changed."""
    version = _find_version(source)
    # Masked tokens are included: counting the others would wait for the GPU.
    tokens = hidden.numel() // hidden.shape[-1]
    old = state.prepared
    if old is not None and old.version == version and not is_better_mean(tokens, old.tokens):
        return old
    mean = _mean(hidden, attention_mask)
    packed, rows = torch.ops.splade_fast.head_prepare(weight, mean)
    prepared = PreparedWeight(mean, packed, rows, None, tokens, version)
    if version is not None:
        state.prepared = prepared
    return prepared


def _find_version(source: Tensor) -> object:
    """Return a value that is equal only while a prepared weight is valid; None: not to be kept.

    It includes the stream, as the prepared weight may not be ready on another one. A CUDA graph
    prepares its own weight, since it would read a kept one after that has been replaced. FSDP2
    gathers changed weights into the same tensor without counting, so where it may run none is kept.
    """
    if source.is_inference() or is_distributed() or torch.cuda.is_current_stream_capturing():
        return None
    return source._version, torch.cuda.current_stream(source.device).cuda_stream


def _mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean of the attended tokens among the first rows."""
    rows = hidden.flatten(0, -2)[:MEAN_TOKENS].float()
    if attention_mask is None:
        return replace_unusable(rows.mean(0))
    is_attended = attention_mask.flatten()[:MEAN_TOKENS, None]
    return replace_unusable(
        torch.where(is_attended, rows, 0.0).sum(0) / is_attended.sum().clamp_min(1)
    )
