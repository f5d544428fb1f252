"""Checks of arguments. Each raises before anything is computed and names expected and got."""

import operator
from collections.abc import Iterable
from itertools import pairwise
from typing import SupportsIndex

import torch
from torch import Tensor

POOLINGS = {"max": 0, "sum": 1, "mean": 2, "last": 3}  # the kernels have the first two
ACTIVATIONS = {"relu": 0, "log1p_relu": 1, "log1p_log1p_relu": 2}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError if the value is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError if the tensor is not a dense tensor of one of DTYPES."""
    check_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise if the tensor has another dtype or device than another argument."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError if the tensor is on another device than another argument."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def check_integer(name: str, value: SupportsIndex) -> int:
    """Return an int. Integers of NumPy and tensors of one integer are accepted too."""
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got bool")
    return value


def check_count(name: str, value: SupportsIndex, least: int) -> int:
    """Return the count as an int, see `check_integer`. Raise ValueError if it is below `least`."""
    value = check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_unicode(name: str, text: str) -> None:
    """Raise ValueError if the text holds half of a surrogate pair, which has no UTF-8 bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(
            f"{name} must be Unicode text, got the lone surrogate {lone!r} at character "
            f"{error.start}"
        ) from None


def check_texts(name: str, texts: Iterable[object]) -> None:
    """Raise TypeError for a text that is no str, and ValueError for one with a lone surrogate."""
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{position}] must be a str, got {type(text).__name__}")
        check_unicode(f"{name}[{position}]", text)


def check_choice(name: str, value: object, choices: dict[str, int]) -> int:
    """Return the number of a choice, as the C++ side has it."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return choices[value]


def check_mask(
    attention_mask: Tensor,
    batch: int,
    length: int,
    other_name: str,
    other: Tensor,
    name: str = "attention_mask",
) -> Tensor:
    """Return the mask as bool: True where it is nonzero."""
    check_tensor(name, attention_mask)
    if attention_mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool, int or float, got {attention_mask.dtype}")
    if attention_mask.ndim != 2 or tuple(attention_mask.shape) != (batch, length):
        raise ValueError(
            f"{name} must be (batch, length) = ({batch}, {length}), "
            f"got {tuple(attention_mask.shape)}"
        )
    check_device(name, attention_mask, other_name, other)
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, other_name: str, other: Tensor) -> None:
    """Check shape, dtype and device of cu_seqlens, and on the CPU its values.

    Reading the values on a GPU would wait for it.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (batch + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, other_name, other)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        falls = any(stop < start for start, stop in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != tokens or falls:
            shown = f"{bounds[:8]}{' …' if len(bounds) > 8 else ''}"
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {tokens} tokens of {other_name}, got {shown}"
            )
