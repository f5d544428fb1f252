"""The input of a language model's decoder, computed without the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from splade_fast._checks import check_mask


class _DecoderReached(Exception):  # noqa: N818 (no error: a way out)
    """Carries the decoder's input out of the model's own forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Exit:
    """A forward pre-hook that stays on the decoder and does nothing unless it is open.

    Hooking the decoder anew for every forward would do as well, but torch.compile cannot trace it.
    It is open for a thread, so that several can encode at a time; in traced code, which has no
    threads, for all.
    """

    def __init__(self) -> None:
        self._traced = False
        self._threads: set[int] = set()

    def __call__(self, decoder: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._traced or (not torch.compiler.is_compiling() and get_ident() in self._threads):
            raise _DecoderReached(args[0])

    def open(self) -> None:
        if torch.compiler.is_compiling():
            self._traced = True
        else:
            self._threads.add(get_ident())

    def close(self) -> None:
        if torch.compiler.is_compiling():
            self._traced = False
        else:
            self._threads.discard(get_ident())


def decoder_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns hidden states into logits over the vocabulary.

    Raises:
        ValueError: the model has none, or it is not a plain linear layer.
    """
    decoder = model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        kind = type(decoder)
        advice = "; keep adapters off the decoder" if kind.__module__.startswith("peft.") else ""
        raise ValueError(
            f"{type(model).__name__}.get_output_embeddings() must be a torch.nn.Linear, "
            f"got {kind.__module__}.{kind.__qualname__}{advice}"
        )
    return decoder


def signature_of(model: PreTrainedModel) -> inspect.Signature:
    """What the forward of the model's class takes."""
    # Of the transformers model itself: a wrapper such as PEFT's takes every argument.
    base_model: Any = getattr(model, "get_base_model", None)
    inner = model if base_model is None else base_model()
    return inspect.signature(type(inner).forward.__get__(inner))


def has_cache(model: PreTrainedModel) -> bool:
    """Whether the model keeps keys and values for generating text unless told not to."""
    return "use_cache" in signature_of(model).parameters


def hidden_before_decoder(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the decoder would be given: (B, L, D), with the gradient graph behind it.

    Any family works, because the model's own forward runs up to the decoder and is left there
    by an exception. The model computes what it did, and the logits never exist.

    Raises:
        ValueError: the model's forward does not call its decoder.
    """
    return left_at_decoder(model, model, **inputs)


def left_at_decoder(
    model: PreTrainedModel, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor:
    """call(…), which runs the model's forward somewhere inside, left where it calls the decoder.

    Returns:
        The decoder's input, as `hidden_before_decoder`.

    Raises:
        ValueError: the decoder was not called.
    """
    way_out = _exit_of(decoder_of(model))
    way_out.open()
    try:
        call(*args, **kwargs)
    except _DecoderReached as reached:
        return reached.hidden
    finally:
        way_out.close()
    raise ValueError(f"{type(model).__name__} does not call its output embeddings as a module")


def head_inputs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    pooling_mask: Tensor | None = None,
    forward: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `splade_head`: hidden states, the decoder's weight and bias, and a mask.

    Args:
        model: the model.
        inputs: of its forward.
        pooling_mask: (B, L), zero leaves a position out which `attention_mask` holds.
        forward: its forward, where calling the model does something else.

    Raises:
        TypeError, ValueError: a mask is not (B, L), or no bool, int or float; or as
            `hidden_before_decoder`.
    """
    counts: Tensor | None = inputs.get("attention_mask")
    if pooling_mask is not None:
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        batch, length = inputs[name].shape[:2]
        attended = counts
        counts = check_mask(pooling_mask, batch, length, name, inputs[name], "pooling_mask")
        if attended is not None:
            counts = counts & check_mask(attended, batch, length, name, inputs[name])
    hidden = left_at_decoder(model, forward or model, **inputs)
    decoder = decoder_of(model)
    return hidden, decoder.weight, decoder.bias, counts


def remove_exit(decoder: nn.Module) -> None:
    """Take off the hook by which forwards of the decoder's model are left."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, _Exit):
            del decoder._forward_pre_hooks[key]


def check_decoder_is_last(model: PreTrainedModel) -> None:
    """Make sure that `hidden · weightᵀ + bias` are the model's logits, with a tiny input.

    The decoder's input is scaled up until the logits are as large as those of a trained model,
    since softcapping, for one, hardly changes small ones.

    Raises:
        ValueError: the model does something else with its decoder or after it.
    """
    decoder = decoder_of(model)
    token_ids = torch.arange(min(4, decoder.out_features), device=decoder.weight.device)[None]
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            hidden = hidden_before_decoder(model, **inputs)
            largest = linear(hidden, decoder.weight).abs().max()
            hidden = hidden * (32 / largest)
            expected = linear(hidden, decoder.weight, decoder.bias)
            handle = decoder.register_forward_pre_hook(lambda module, args: (hidden,))
            try:
                logits = model(**inputs, return_dict=True).logits
            finally:
                handle.remove()
    finally:
        model.train(was_training)
    rounding = 16 * torch.finfo(expected.dtype).eps
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected, rtol=rounding, atol=32 * rounding
    ):
        raise ValueError(
            f"{type(model).__name__} must have the logits hidden · weightᵀ + bias of its output "
            "embeddings, but its forward computes others; this family is not supported"
        )


def _exit_of(decoder: nn.Module) -> _Exit:
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(hook, _Exit):
            return hook
    way_out = _Exit()
    decoder.register_forward_pre_hook(way_out)
    return way_out
