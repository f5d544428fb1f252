"""SpladeHead and SpladePool: the ops head and pool as torch modules."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from splade_fast._checks import ACTIVATIONS, POOLINGS, check_choice
from splade_fast.ops.head.head import splade_head
from splade_fast.ops.head.scale import check_logit_scale
from splade_fast.ops.head.screening import ALGORITHMS
from splade_fast.ops.pool import splade_pool


class SpladeHead(nn.Module):
    """Module that applies `splade_head` with the parameters of a decoder.

    The module shares its parameters with the decoder, so that training one trains the other. They
    have the names of a `torch.nn.Linear`: each loads the `state_dict()` of the other, and a head in
    the place of a decoder leaves the names in saved files unchanged.

    Args:
        decoder: a `torch.nn.Linear(D, V)`, or its weight, a `torch.nn.Parameter` (V, D), such as
            the weight of an embedding.
        bias: a `torch.nn.Parameter` (V,) for a decoder that is a weight; None for a Linear, whose
            own bias is used.
        pooling: "max", "sum", "mean" or "last".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".
        logit_scale: factor of the logits, a number or, to train it, a `torch.nn.Parameter` of one,
            which becomes a parameter of the module.
        algorithm: "auto", "dense" or "screened", see `splade_head`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.

    Example::

        >>> head = sf.SpladeHead(torch.nn.Linear(8, 100))
        >>> head(torch.randn(2, 5, 8)).shape
        torch.Size([2, 100])
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
        logit_scale: float | nn.Parameter = 1.0,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        weight, bias = _parameters(decoder, bias)
        _check_options(pooling, activation)
        check_choice("algorithm", algorithm, ALGORITHMS)
        check_logit_scale(logit_scale)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.pooling = pooling
        self.activation = activation
        self.logit_scale = logit_scale
        self.algorithm = algorithm

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return pooled vectors (B, V), differentiable in hidden, weight and bias.

        Args:
            hidden: (B, L, D), or packed (T, D) with cu_seqlens.
            attention_mask: (B, L), bool, int or float; positions with 0 are left out. None: all
                positions take part.
            cu_seqlens: (B + 1,) int32, the start of each sequence in packed hidden, then T.

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
            logit_scale=self.logit_scale,
            algorithm=self.algorithm,
        )

    def extra_repr(self) -> str:
        """Return the sizes and options that `print` shows."""
        vocabulary, dim = self.weight.shape
        scale = "trained" if isinstance(self.logit_scale, Tensor) else f"{self.logit_scale:g}"
        return (
            f"{dim}, {vocabulary}, bias={self.bias is not None}, pooling={self.pooling!r}, "
            f"activation={self.activation!r}, logit_scale={scale}, algorithm={self.algorithm!r}"
        )


class SpladePool(nn.Module):
    """Module that applies `splade_pool` to logits.

    `SpladeHead` is faster where a model can return hidden states instead of logits.

    Args:
        pooling: "max", "sum", "mean" or "last".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".

    Raises:
        ValueError: pooling or activation is unknown.

    Example::

        >>> pool = sf.SpladePool(pooling="sum", activation="relu")
        >>> pool(torch.tensor([[[2.0, -1.0], [0.5, 3.0]]]))
        tensor([[2.5000, 3.0000]])
    """

    def __init__(self, pooling: str = "max", activation: str = "log1p_relu") -> None:
        super().__init__()
        _check_options(pooling, activation)
        self.pooling = pooling
        self.activation = activation

    def forward(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return pooled vectors (B, V), differentiable in logits.

        Args:
            logits: (B, L, V).
            attention_mask: (B, L), bool, int or float; positions with 0 are left out. None: all
                positions take part.

        Raises:
            TypeError, ValueError, RuntimeError: as `splade_pool`.
        """
        return splade_pool(logits, attention_mask, pooling=self.pooling, activation=self.activation)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"pooling={self.pooling!r}, activation={self.activation!r}"


def _parameters(
    decoder: nn.Linear | nn.Parameter, bias: nn.Parameter | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias. Raise if they are not a decoder."""
    if isinstance(decoder, nn.Linear):
        if bias is not None:
            raise ValueError("bias must be None with a torch.nn.Linear, which has its own")
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
    """Raise ValueError if pooling or activation is unknown."""
    check_choice("pooling", pooling, POOLINGS)
    check_choice("activation", activation, ACTIVATIONS)
