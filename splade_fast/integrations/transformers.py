"""accelerate: a transformers language model whose forward returns pooled vectors, no logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from splade_fast._checks import ACTIVATIONS, POOLINGS, check_choice
from splade_fast.encoders.hidden_states import (
    check_decoder_is_last,
    find_decoder,
    forward_signature,
    has_key_value_cache,
    head_inputs,
    remove_decoder_hook,
)
from splade_fast.ops.head import splade_head

Model = TypeVar("Model", bound=PreTrainedModel)

# Outputs that only the model's own forward has, and the inputs that ask for them.
_WITHOUT_LOGITS = ("labels", "output_hidden_states", "output_attentions")


@dataclass
class PooledOutput(ModelOutput):
    """What an accelerated model returns: `pooled`, (B, V)."""

    pooled: Tensor | None = None


def accelerate(model: Model, *, pooling: str = "max", activation: str = "log1p_relu") -> Model:
    """Make `model(**inputs).pooled` the SPLADE vectors (B, V), in place; no logits are computed.

    pooled[b, v] = max or sum over attended tokens l of activation(logits[b, l, v]), and gradients,
    are those of the model's own logits (`splade_head`). Only `model.forward` changes. Class,
    parameters, `state_dict`, saved files, hooks, adapters, checkpointing and the tokenizer stay,
    and autocast, `torch.compile` and DistributedDataParallel work as before. `restore` undoes it;
    accelerating again changes the options.

    The forward takes what it took, and `pooling_mask`, (B, L), in which a zero leaves a position
    out of the pooling that the transformer attends to, such as a token of the prompt. With
    `return_dict=False` it returns the tuple (pooled,). `labels`, `output_hidden_states` and
    `output_attentions` raise ValueError: their results need the rest of the model's own forward
    (where the config asks for them, they are left out). Causal models no longer generate text.

    Args:
        model: a masked or causal language model of transformers, wrapped by PEFT or not, whose
            logits are `hidden · weightᵀ + bias` of its output embeddings.
        pooling: "max" or "sum".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: model is no such model, or pooling or activation is unknown; the
            model is as it was.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model must be a transformers language model, got {type(model).__name__}")
    check_choice("pooling", pooling, POOLINGS)
    check_choice("activation", activation, ACTIVATIONS)
    if _accelerated(model):
        restore(model)
    check_decoder_is_last(model)
    # An instance's forward goes before that of its class.
    model.__dict__["forward"] = _PooledForward(model, pooling, activation)
    return model


def restore(model: nn.Module) -> None:
    """Give a model that `accelerate` changed its own forward back.

    Args:
        model: the model, or what was wrapped around it since (PEFT, DistributedDataParallel,
            `torch.compile`, a module of your own).

    Raises:
        ValueError: there is no accelerated model in it.
    """
    accelerated = _accelerated(model)
    if not accelerated:
        raise ValueError(
            f"model must be one that splade_fast.accelerate changed, got {type(model).__name__}"
        )
    for module in accelerated:
        module.__dict__.pop("forward").undo()


class _PooledForward:
    """The forward of an accelerated model: picklable, and copied along with its model."""

    def __init__(self, model: PreTrainedModel, pooling: str, activation: str) -> None:
        self._model = model
        self._earlier = model.__dict__.get("forward")  # what else sits on the instance
        self._pooling = pooling
        self._activation = activation
        self._names = tuple(forward_signature(model).parameters)
        self._has_key_value_cache = has_key_value_cache(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """For those who ask what the model takes, as Trainer does of a dataset's columns."""
        return forward_signature(self._model)

    def __call__(
        self, *args: Any, pooling_mask: Tensor | None = None, **kwargs: Any
    ) -> PooledOutput | tuple[Tensor]:
        if len(args) > len(self._names):
            raise TypeError(
                f"the model takes {len(self._names)} positional arguments, got {len(args)}"
            )
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name in _WITHOUT_LOGITS:
            asked = inputs.pop(name, None)
            if asked is not None and asked is not False:
                raise ValueError(
                    f"{name} must be left out: an accelerated {type(self._model).__name__} stops "
                    "before its logits; splade_fast.restore(model) gives its own forward back"
                )
        as_dict = inputs.pop("return_dict", None)
        if self._has_key_value_cache:  # of keys and values, for generating text
            inputs.setdefault("use_cache", False)
        pooled = splade_head(
            *head_inputs(self._model, inputs, pooling_mask, self._own_forward()),
            pooling=self._pooling,
            activation=self._activation,
        )
        if as_dict is None:
            as_dict = self._model.config.return_dict
        return PooledOutput(pooled=pooled) if as_dict else (pooled,)

    def undo(self) -> None:
        if self._earlier is not None:
            self._model.__dict__["forward"] = self._earlier
        remove_decoder_hook(find_decoder(self._model))

    def _own_forward(self) -> Callable[..., Any]:
        earlier: Callable[..., Any] | None = self._earlier
        return earlier or type(self._model).forward.__get__(self._model)


def _accelerated(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(module.__dict__.get("forward"), _PooledForward)
    ]
