"""SpladeHead and SpladePool: the ops head and pool as modules."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from splade_fast._checks import ACTIVATIONS, POOLINGS, check_choice
from splade_fast.ops.head.head import splade_head
from splade_fast.ops.head.screening import ALGORITHMS
from splade_fast.ops.pool import splade_pool


class SpladeHead(nn.Module):
    """pooled[b, v] = max or sum over counted l of activation(hidden[b, l] · weight[v] + bias[v]).

    `splade_head` with a decoder's parameters. They are the decoder's own, so that what trains one
    trains the other, and their names are those of a `torch.nn.Linear`: either loads the other's
    `state_dict()`, and a head that takes a decoder's place in a model leaves the names in saved
    files as they are.

    Args:
        decoder: a `torch.nn.Linear(D, V)`, or its weight, a `torch.nn.Parameter` (V, D), such as
            that of an embedding.
        bias: a `torch.nn.Parameter` (V,) beside a weight; a Linear brings its own.
        pooling: "max" or "sum".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".
        algorithm: "auto", "dense" or "screened", see `splade_head`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or name.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        decoder: nn.Linear | nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        pooling: str = "max",
        activation: str = "log1p_relu",
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        weight, bias = _parameters(decoder, bias)
        _check_options(pooling, activation)
        check_choice("algorithm", algorithm, ALGORITHMS)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.pooling = pooling
        self.activation = activation
        self.algorithm = algorithm

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors (B, V), differentiable in hidden, weight and bias.

        Args:
            hidden: (B, L, D), or packed (T, D) with cu_seqlens.
            attention_mask: (B, L), bool, int or float; nonzero = counts. None: all count.
            cu_seqlens: (B + 1,) int32, starts of the sequences in packed hidden, ending with T.

        Raises:
            TypeError, ValueError, RuntimeError, NotImplementedError: as `splade_head`.
        """
        return splade_head(
            hidden,
            self.weight,
            self.bias,
            attention_mask,
            cu_seqlens=cu_seqlens,
            pooling=self.pooling,
            activation=self.activation,
            algorithm=self.algorithm,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `print`."""
        vocabulary, dim = self.weight.shape
        return (
            f"{dim}, {vocabulary}, bias={self.bias is not None}, pooling={self.pooling!r}, "
            f"activation={self.activation!r}, algorithm={self.algorithm!r}"
        )


class SpladePool(nn.Module):
    """pooled[b, v] = max or sum over the counted positions l of activation(logits[b, l, v]).

    `splade_pool` for models that compute logits; where they can be left out, see `SpladeHead`.

    Args:
        pooling: "max" or "sum".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".

    Raises:
        ValueError: an unknown pooling or activation.
    """

    def __init__(self, pooling: str = "max", activation: str = "log1p_relu") -> None:
        super().__init__()
        _check_options(pooling, activation)
        self.pooling = pooling
        self.activation = activation

    def forward(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pooled vectors (B, V), differentiable in logits.

        Args:
            logits: (B, L, V).
            attention_mask: (B, L), bool, int or float; nonzero = counts. None: all count.

        Raises:
            TypeError, ValueError, RuntimeError: as `splade_pool`.
        """
        return splade_pool(logits, attention_mask, pooling=self.pooling, activation=self.activation)

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return f"pooling={self.pooling!r}, activation={self.activation!r}"


def _parameters(
    decoder: nn.Linear | nn.Parameter, bias: nn.Parameter | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias, checked."""
    if isinstance(decoder, nn.Linear):
        if bias is not None:
            raise ValueError("bias must be None beside a torch.nn.Linear, which brings its own")
        return cast(nn.Parameter, decoder.weight), cast(nn.Parameter | None, decoder.bias)
    if not isinstance(decoder, nn.Parameter):
        raise TypeError(
            "decoder must be a torch.nn.Linear or its weight as a torch.nn.Parameter, "
            f"got {type(decoder).__name__}"
        )
    if bias is not None and not isinstance(bias, nn.Parameter):
        raise TypeError(f"bias must be a torch.nn.Parameter or None, got {type(bias).__name__}")
    if decoder.ndim != 2:
        raise ValueError(f"decoder must be (vocabulary, dim), got {tuple(decoder.shape)}")
    if bias is not None and bias.shape != decoder.shape[:1]:
        raise ValueError(
            f"bias must be (vocabulary,) = ({decoder.shape[0]},), got {tuple(bias.shape)}"
        )
    return decoder, bias


def _check_options(pooling: str, activation: str) -> None:
    check_choice("pooling", pooling, POOLINGS)
    check_choice("activation", activation, ACTIVATIONS)
