"""accelerate: make the forward of a transformers language model return pooled vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
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
from splade_fast.ops.head.scale import check_logit_scale

Model = TypeVar("Model", bound=PreTrainedModel)

# Inputs that ask for outputs of the part of the forward which is not run.
_UNSUPPORTED_INPUTS = ("labels", "output_hidden_states", "output_attentions")


@dataclass
class PooledOutput(ModelOutput):
    """Output of an accelerated model.

    Args:
        pooled: SPLADE vectors, (B, V).
    """

    pooled: Tensor | None = None


def accelerate(
    model: Model,
    *,
    pooling: str = "max",
    activation: str = "log1p_relu",
    logit_scale: float | Tensor = 1.0,
) -> Model:
    """Make `model(**inputs).pooled` the SPLADE vectors, without computing logits.

    pooled[b, v] = max, sum or mean over attended tokens l, or the value at the last such l, of
    activation(logit_scale · logits[b, l, v]). Vectors and gradients equal those of the model's own
    logits; see `splade_head`. The model is changed in place, but only in its forward: parameters,
    `state_dict`, saved files, hooks and adapters stay, and autocast, `torch.compile`, gradient
    checkpointing and DistributedDataParallel work as before. `restore` undoes the change. A second
    call changes the options.

    The forward takes its own inputs and `pooling_mask`, (B, L), which is zero at positions that
    the transformer attends to but the pooling leaves out, such as tokens of a prompt. With
    `return_dict=False` the forward returns the tuple (pooled,). The inputs `labels`,
    `output_hidden_states` and `output_attentions` raise ValueError, since their results need the
    rest of the forward; such options in the model's config have no effect. Causal models cannot
    generate text until they are restored.

    Args:
        model: a masked or causal language model of transformers, with or without PEFT adapters,
            whose logits are `hidden · weightᵀ + bias` of its output embeddings.
        pooling: "max", "sum", "mean" or "last".
        activation: "relu", "log1p_relu" or "log1p_log1p_relu".
        logit_scale: factor of the logits, a number, or a tensor of one to train beside the model's
            parameters.

    Returns:
        The model.

    Raises:
        TypeError: model is not a transformers language model.
        ValueError: the model has other logits, pooling or activation is unknown, or logit_scale is
            not finite. The model is unchanged.

    Example::

        >>> from transformers import AutoModelForMaskedLM
        >>> model = sf.accelerate(AutoModelForMaskedLM.from_pretrained("CHECKPOINT"))
        >>> model(torch.tensor([[2, 5, 3]])).pooled.shape == (1, model.config.vocab_size)
        True
    """
    if not hasattr(model, "get_output_embeddings"):
        kind = type(model)
        is_theirs = kind.__module__.startswith("sentence_transformers.")
        other = ", which splade_fast.integrations.sentence_transformers.accelerate takes"
        raise TypeError(
            f"model must be a transformers language model, got {kind.__name__}{other * is_theirs}"
        )
    check_choice("pooling", pooling, POOLINGS)
    check_choice("activation", activation, ACTIVATIONS)
    check_logit_scale(logit_scale)
    if _find_accelerated(model):
        restore(model)
    check_decoder_is_last(model)
    # The instance's forward hides that of its class.
    model.__dict__["forward"] = _PooledForward(model, pooling, activation, logit_scale)
    return model


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: give the model its own forward back.

    Args:
        model: the accelerated model, or a module that contains it, such as a wrapper of PEFT,
            DistributedDataParallel or `torch.compile`.

    Raises:
        ValueError: the module contains no accelerated model.

    Example::

        >>> from transformers import AutoModelForMaskedLM
        >>> model = sf.accelerate(AutoModelForMaskedLM.from_pretrained("CHECKPOINT"))
        >>> sf.restore(model)
        >>> list(model(torch.tensor([[2, 5, 3]])))
        ['logits']
    """
    accelerated = _find_accelerated(model)
    if not accelerated:
        raise ValueError(
            f"model must be one that splade_fast.accelerate changed, got {type(model).__name__}"
        )
    for module in accelerated:
        module.__dict__.pop("forward").undo()


class _PooledForward:
    """Forward of an accelerated model; pickled and copied with the model."""

    def __init__(
        self, model: PreTrainedModel, pooling: str, activation: str, logit_scale: float | Tensor
    ) -> None:
        self._model = model
        self._replaced_forward = model.__dict__.get("forward")  # set by another library, or None
        self._pooling = pooling
        self._activation = activation
        self._logit_scale = logit_scale
        self._input_names = tuple(forward_signature(model).parameters)
        self._has_key_value_cache = has_key_value_cache(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the model's own forward, from which Trainer selects a dataset's columns."""
        return forward_signature(self._model)

    @property
    def __code__(self) -> CodeType:
        """Code of the forward, whose place torch.export notes."""
        return type(self).__call__.__code__

    def __call__(
        self, *args: Any, pooling_mask: Tensor | None = None, **kwargs: Any
    ) -> PooledOutput | tuple[Tensor]:
        most = len(self._input_names)
        if len(args) > most:
            raise TypeError(f"the model takes at most {most} positional arguments, got {len(args)}")
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs}
        for name in _UNSUPPORTED_INPUTS:
            value = inputs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(
                    f"{name} must be left out: an accelerated {type(self._model).__name__} stops "
                    "before its logits; splade_fast.restore(model) undoes the acceleration"
                )
        is_dict = inputs.pop("return_dict", None)
        if self._has_key_value_cache:  # needed to generate text only
            inputs.setdefault("use_cache", False)
        pooled = splade_head(
            *head_inputs(self._model, inputs, pooling_mask, self._own_forward()),
            pooling=self._pooling,
            activation=self._activation,
            logit_scale=self._logit_scale,
        )
        if is_dict is None:
            is_dict = self._model.config.return_dict
        return PooledOutput(pooled=pooled) if is_dict else (pooled,)

    def undo(self) -> None:
        if self._replaced_forward is not None:
            self._model.__dict__["forward"] = self._replaced_forward
        remove_decoder_hook(find_decoder(self._model))

    def _own_forward(self) -> Callable[..., Any]:
        replaced: Callable[..., Any] | None = self._replaced_forward
        return replaced or type(self._model).forward.__get__(self._model)


def _find_accelerated(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(module.__dict__.get("forward"), _PooledForward)
    ]
