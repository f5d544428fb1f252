"""Acceleration of a SparseEncoder in place, and its removal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from splade_fast.encoders.hidden_states import (
    check_decoder_is_last,
    find_decoder,
    remove_decoder_hook,
)
from splade_fast.integrations.sentence_transformers.encoder import SparseRowsEncoder
from splade_fast.integrations.sentence_transformers.modules import HeadPooling, HiddenTransformer
from splade_fast.integrations.sentence_transformers.swapping import (
    original_class,
    swap_back,
    swap_in,
)

Encoder = TypeVar("Encoder", bound=SparseEncoder)


def accelerate(sparse_encoder: Encoder) -> Encoder:
    """Make a SparseEncoder compute pooled(hidden · weightᵀ + bias) without the logits.

    Arguments, results (within rounding), training and saved files stay the same. Each Transformer
    before a SpladePooling stops before its decoder, and the pooling runs the fused head with the
    weight of the decoder. This includes the routes of a Router. Other modules, such as the
    SparseStaticEmbedding of queries, do not change. `restore` undoes the change.

    Example::

        >>> from sentence_transformers import SparseEncoder
        >>> from splade_fast.integrations.sentence_transformers import accelerate
        >>> model = accelerate(SparseEncoder("CHECKPOINT"))
        >>> model.encode(["A quick fox."]).is_sparse
        True

    Args:
        sparse_encoder: model that is changed in place. Its modules keep their identity and type.

    Returns:
        The same object.

    Raises:
        TypeError: sparse_encoder is not a SparseEncoder.
        ValueError: no SpladePooling follows a Transformer, as in CSR models, or the class of a
            Transformer or SpladePooling overrides `forward`. The model has not changed then.
    """
    if not isinstance(sparse_encoder, SparseEncoder):
        raise TypeError(
            f"sparse_encoder must be a SparseEncoder, got {type(sparse_encoder).__name__}"
        )
    pairs = _pairs(list(sparse_encoder))
    for transformer, pooling in pairs:
        _check_pair(transformer, pooling)
    for transformer, pooling in pairs:
        swap_in(HiddenTransformer, transformer)
        swap_in(HeadPooling, pooling)
    swap_in(SparseRowsEncoder, sparse_encoder)
    return sparse_encoder


def restore(sparse_encoder: Encoder) -> Encoder:
    """Undo `accelerate`.

    Example::

        >>> from sentence_transformers import SparseEncoder
        >>> from splade_fast.integrations.sentence_transformers import accelerate, restore
        >>> model = restore(accelerate(SparseEncoder("CHECKPOINT")))

    Args:
        sparse_encoder: model that is changed in place. Other models than accelerated ones do not
            change.

    Returns:
        The same object.
    """
    for module in sparse_encoder.modules():
        if isinstance(module, HiddenTransformer):
            remove_decoder_hook(find_decoder(module.model))
        swap_back(module)
    return sparse_encoder


def _pairs(modules: Sequence[nn.Module]) -> list[tuple[Any, Any]]:
    """Return each Transformer followed by a SpladePooling, with that pooling."""
    steps = list(_steps(modules, None))
    pairs = [
        (module, following)
        for module, following in steps
        if isinstance(module, Transformer) and isinstance(following, SpladePooling)
    ]
    if not pairs:
        names = [original_class(module).__name__ for module, _ in steps]
        raise ValueError(
            "sparse_encoder must have a Transformer followed by SpladePooling, which CSR "
            f"models lack, got {', '.join(names)}"
        )
    for transformer, _ in pairs:
        for module, following in steps:
            if module is transformer and not isinstance(following, SpladePooling):
                raise ValueError(
                    "each use of a Transformer must be followed by SpladePooling, "
                    f"got {'nothing' if following is None else type(following).__name__}"
                )
    return pairs


def _steps(
    modules: Sequence[nn.Module], after: nn.Module | None
) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yield each module with the module that follows it, including the routes of a Router."""
    for module, following in zip(modules, [*modules[1:], after], strict=True):
        if isinstance(module, Router):
            router: Any = module
            for route in router.sub_modules.values():
                yield from _steps(list(route), following)
        else:
            yield module, following


def _check_pair(transformer: Any, pooling: Any) -> None:
    """Raise ValueError unless both run the library's `forward` and the decoder gives the logits."""
    for module, library_class in ((transformer, Transformer), (pooling, SpladePooling)):
        kind = original_class(module)
        if kind.forward is not library_class.forward:
            raise ValueError(
                f"{kind.__name__} must have the forward of {library_class.__name__}, got its own"
            )
    if transformer.backend != "torch":
        raise ValueError(f"backend must be 'torch', got {transformer.backend!r}")
    output = transformer.modality_config["text"]["method_output_name"]
    if output not in ("logits", ("logits",), ["logits"]):
        raise ValueError(
            "the Transformer must give logits, as with transformer_task='fill-mask', "
            f"got {output!r} of transformer_task={transformer.transformer_task!r}"
        )
    check_decoder_is_last(transformer.model)
