"""prune: dense rows (B, V) -> their largest entries, without sorting them."""

from typing import Any

import torch
from torch import Tensor

from splade_fast import _library, reference
from splade_fast._checks import DTYPES, check_count, check_floating
from splade_fast.ops.autograd import refuse_forward_mode
from splade_fast.reference.prune import keep_largest


def prune_topk(x: Tensor, k: int) -> Tensor:
    """Set all but the k largest entries of each row to 0.

    Negative entries are kept where they are among the k largest. Of equal entries the one in the
    lowest column counts as the larger; NaN counts as the largest. The gradient goes to the kept
    entries, also to kept zeros. See `SparseRows.from_dense` for sparse output.

    Args:
        x: (B, V), float32, float64, bfloat16 or float16, with any strides.
        k: number of entries to keep in each row, at least 0. All are kept if k ≥ V.

    Returns:
        A new tensor (B, V) in the dtype of x.

    Raises:
        TypeError, ValueError: x is not a floating-point matrix, or k is not an integer ≥ 0.
        RuntimeError: a forward-mode derivative is requested.

    Example::

        >>> x = torch.tensor([[0.0, 3.0, 1.0]])
        >>> sf.prune_topk(x, 1)
        tensor([[0., 3., 0.]])
    """
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be (rows, columns), got {tuple(x.shape)}")
    k = check_count("k", k, 0)
    if k >= x.shape[1]:
        return x.clone()
    if not _library.has_kernels(x.device):
        return reference.prune_topk(x, k)
    return dense_rows(*_prune_rows(x, k, None, None, None), x.shape[1])


def prune_rows(
    x: Tensor,
    k: int | None,
    threshold: float,
    max_ratio: float | None,
    mass: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, values and lengths for `SparseRows.from_dense`, which checks the arguments.

    The width is the largest length, except on a GPU without `mass`: there it is min(k, V), which
    is known without waiting for the GPU, or without k the largest number of entries above the
    threshold.
    """
    if x.dtype not in DTYPES or not _library.has_kernels(x.device):
        return reference.prune_rows(x, k, threshold, max_ratio, mass)
    if x.device.type != "cuda":
        return _prune_rows(x, k, threshold, max_ratio, mass)
    if k is not None and mass is None:
        return _prune_rows(x, k, threshold, max_ratio, None)
    # The width has to be known before the kernel runs: count the entries above the threshold.
    above = (~(x.detach() <= threshold)).sum(1)
    most = int(above.max()) if len(above) else 0
    if mass is None:
        return _prune_rows(x, most, threshold, max_ratio, None)
    # mass needs the entries in sorted order, which the kernel does not produce.
    candidates = _prune_rows(x, most, threshold, None, None)
    return keep_largest(*candidates, k, max_ratio, mass)


def dense_rows(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> Tensor:
    """Return padded rows (B, K) as a dense (B, num_cols) tensor, without waiting for a GPU."""
    if values.device.type not in ("cpu", "meta") or values.dtype not in DTYPES:
        return reference.dense_rows(indices, values, lengths, num_cols)
    if not _library.has_kernels(values.device):
        return reference.dense_rows(indices, values, lengths, num_cols)
    refuse_forward_mode("SparseRows.to_dense", values)
    dense: Tensor = torch.ops.splade_fast.dense_rows(values, indices, lengths, num_cols)
    return dense


def _prune_rows(
    x: Tensor,
    k: int | None,
    threshold: float | None,
    max_ratio: float | None,
    mass: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_forward_mode("pruning", x)
    # The op returns the values first, since torch.library.opcheck adds the outputs up in place.
    values, indices, lengths = torch.ops.splade_fast.prune_rows(x, k, threshold, max_ratio, mass)
    return indices, values, lengths


def _fake_prune(
    x: Tensor,
    k: int | None,
    threshold: float | None,
    max_ratio: float | None,
    mass: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    full = threshold is None and max_ratio is None and mass is None
    width: int | torch.SymInt
    if full or x.device.type == "cuda":
        width = columns if k is None else min(k, columns)
    else:
        width = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((rows, width)),
        x.new_empty((rows, width), dtype=torch.int32),
        x.new_empty((rows,), dtype=torch.int32),
    )


def _setup_context_prune(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.columns = inputs[0].shape[1]
    ctx.save_for_backward(output[1])


def _backward_prune(
    ctx: Any, grad: Tensor | None, _indices: None, _lengths: None
) -> tuple[Tensor | None, ...]:
    """Compute the gradient with differentiable ops, which makes second derivatives possible."""
    if grad is None:
        return (None,) * 5
    (indices,) = ctx.saved_tensors
    # Unused slots add 0 to column 0.
    used = grad.masked_fill(indices < 0, 0)
    dense = grad.new_zeros(grad.shape[0], ctx.columns)
    return dense.scatter_add(1, indices.clamp(min=0).long(), used), None, None, None, None


def _fake_dense(values: Tensor, indices: Tensor, lengths: Tensor, num_cols: int) -> Tensor:
    return values.new_empty((values.shape[0], num_cols))


def _setup_context_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_dense(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    if grad.shape[1] == 0:  # no column that the gather below could read
        return grad.new_zeros(indices.shape), None, None, None
    used = grad.gather(1, indices.clamp(min=0).long()).masked_fill(indices < 0, 0)
    return used, None, None, None


if _library.is_cpu_library_loaded():
    torch.library.register_fake("splade_fast::prune_rows", _fake_prune)
    torch.library.register_fake("splade_fast::dense_rows", _fake_dense)
    torch.library.register_autograd(
        "splade_fast::dense_rows", _backward_dense, setup_context=_setup_context_dense
    )
    torch.library.register_autograd(
        "splade_fast::prune_rows", _backward_prune, setup_context=_setup_context_prune
    )
