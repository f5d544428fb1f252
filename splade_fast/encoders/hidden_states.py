"""Hidden states that a language model gives its decoder, computed without the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from splade_fast._checks import check_mask
from splade_fast.encoders.sharding import is_sharded
from splade_fast.encoders.threads import evaluation_mode

_adding_hook = Lock()


class _DecoderReached(Exception):  # noqa: N818 (control flow, not an error)
    """Stop a model's forward at the decoder and carry the decoder's input to the caller."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _StopAtDecoder:
    """Forward pre-hook of a decoder that raises `_DecoderReached` while it is active.

    The hook stays registered, because torch.compile cannot trace the registration of a hook in
    each forward. The hook is active per thread, so that several threads can use one model. Traced
    code has no threads: there the hook is active for all.
    """

    def __init__(self) -> None:
        self._is_active_in_trace = False
        self._active_threads: set[int] = set()

    def __call__(self, decoder: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._is_active_in_trace or (
            not torch.compiler.is_compiling() and get_ident() in self._active_threads
        ):
            raise _DecoderReached(args[0])

    def __reduce__(self) -> tuple[type[_StopAtDecoder], tuple[()]]:
        """Pickle and copy the hook as one that is active nowhere."""
        return _StopAtDecoder, ()

    def activate(self) -> None:
        if torch.compiler.is_compiling():
            self._is_active_in_trace = True
        else:
            self._active_threads.add(get_ident())

    def deactivate(self) -> None:
        if torch.compiler.is_compiling():
            self._is_active_in_trace = False
        else:
            self._active_threads.discard(get_ident())


def find_decoder(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that turns hidden states into logits over the vocabulary.

    Raises:
        ValueError: the model has no output embeddings, or they are not a plain linear layer.
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


def forward_signature(model: PreTrainedModel) -> inspect.Signature:
    """Return the signature of the transformers model's forward, without `self`.

    A wrapper such as PEFT's accepts any argument, so the wrapped model is inspected instead.
    """
    base_model: Any = getattr(model, "get_base_model", None)
    inner = model if base_model is None else base_model()
    return inspect.signature(type(inner).forward.__get__(inner))


def has_key_value_cache(model: PreTrainedModel) -> bool:
    """Return whether the model's forward takes `use_cache`, as models that generate text do."""
    return "use_cache" in forward_signature(model).parameters


def hidden_before_decoder(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the decoder's input, (B, L, D), with its gradient graph.

    The model's own forward runs up to the decoder, so any model family works and the logits are
    never computed.

    Raises:
        ValueError: the model's forward does not call its decoder.
    """
    return run_to_decoder(model, model, **inputs)


def run_to_decoder(
    model: PreTrainedModel, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor:
    """Run `call(*args, **kwargs)` until the model's forward reaches the decoder.

    Args:
        model: the model whose forward `call` runs.
        call: the model itself, or any function that calls the model.

    Returns:
        The decoder's input, (B, L, D).

    Raises:
        ValueError: the decoder was not called.
    """
    run = _run_past_decoder if _is_exporting_calls() else _stop_at_decoder
    hidden = run(find_decoder(model), call, *args, **kwargs)
    if hidden is None:
        raise ValueError(f"{type(model).__name__} does not call its output embeddings as a module")
    return hidden


def _stop_at_decoder(
    decoder: nn.Linear, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor | None:
    """Return the decoder's input in `call`, which ends there; None if it is not reached."""
    hook = _find_or_add_hook(decoder)
    hook.activate()
    try:
        call(*args, **kwargs)
    except _DecoderReached as reached:
        return reached.hidden
    finally:
        hook.deactivate()
    return None


def _run_past_decoder(
    decoder: nn.Linear, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor | None:
    """Return the decoder's input in `call`, which goes on with logits of no vocabulary."""
    found: list[Tensor] = []
    caller, own = get_ident(), decoder.forward  # other threads may use the model
    replaced = decoder.__dict__.get("forward")  # set by another library, or None

    def forward(hidden: Tensor) -> Tensor:
        if get_ident() != caller:
            return own(hidden)
        found.append(hidden)
        return hidden[..., :0]

    decoder.__dict__["forward"] = forward
    try:
        call(*args, **kwargs)
    finally:
        del decoder.__dict__["forward"]
        if replaced is not None:
            decoder.__dict__["forward"] = replaced
    return found[0] if found else None


def _is_exporting_calls() -> bool:
    """Return whether torch.export follows the calls of modules, which no exception may end then.

    With strict=True it reads the code instead, as torch.compile does.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def head_inputs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    pooling_mask: Tensor | None = None,
    forward: Callable[..., Any] | None = None,
    run: Callable[..., Tensor] = run_to_decoder,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the arguments of `splade_head`: hidden states, the decoder's weight, its bias, a mask.

    Args:
        model: the model.
        inputs: keyword arguments of the model's forward.
        pooling_mask: (B, L), zero leaves a position out of the pooling. Positions that
            `attention_mask` leaves out are never pooled.
        forward: the model's forward, where calling the model would do something else.
        run: `run_to_decoder`, or what torch.compile made of it.

    Raises:
        TypeError, ValueError: a mask is not (B, L) or not bool, int or float; or an error of
            `run_to_decoder`.
    """
    mask: Tensor | None = inputs.get("attention_mask")
    if pooling_mask is not None:
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        batch, length = inputs[name].shape[:2]
        attention_mask = mask
        mask = check_mask(pooling_mask, batch, length, name, inputs[name], "pooling_mask")
        if attention_mask is not None:
            mask = mask & check_mask(attention_mask, batch, length, name, inputs[name])
    hidden = run(model, forward or model, **inputs)
    decoder = find_decoder(model)
    return hidden, decoder.weight, decoder.bias, mask


def remove_decoder_hook(decoder: nn.Module) -> None:
    """Remove the hook that `run_to_decoder` left on the decoder."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, _StopAtDecoder):
            del decoder._forward_pre_hooks[key]


def check_decoder_is_last(model: PreTrainedModel) -> None:
    """Check with a tiny input that the model's logits are `hidden · weightᵀ + bias`.

    The decoder's input is scaled up until the logits are as large as those of a trained model:
    a model that soft-caps its logits, for example, hardly changes small ones.

    Raises:
        ValueError: the model computes other logits from the decoder's input, or logits that are
            not finite, or FSDP2 has sharded it.
    """
    if is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} must be whole, got one that FSDP2 has sharded: accelerate it, "
            "or make its encoder, before fully_shard"
        )
    decoder = find_decoder(model)
    token_ids = torch.arange(min(4, decoder.out_features), device=decoder.weight.device)[None]
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    with evaluation_mode(model), torch.inference_mode():
        hidden = hidden_before_decoder(model, **inputs)
        largest = linear(hidden, decoder.weight).abs().max()
        if not largest.isfinite():
            raise ValueError(
                f"{type(model).__name__} must have finite logits, got NaN or infinity; its weights "
                f"are damaged or too large for {decoder.weight.dtype}"
            )
        hidden = hidden * (32 / largest)
        expected = linear(hidden, decoder.weight, decoder.bias)
        caller = get_ident()  # other threads may use the model
        handle = decoder.register_forward_pre_hook(
            lambda module, args: (hidden,) if get_ident() == caller else None
        )
        try:
            logits = model(**inputs, return_dict=True).logits
        finally:
            handle.remove()
    rounding = 16 * torch.finfo(expected.dtype).eps
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected, rtol=rounding, atol=32 * rounding
    ):
        raise ValueError(
            f"{type(model).__name__} must have the logits hidden · weightᵀ + bias of its output "
            "embeddings, but its forward computes others; this family is not supported"
        )


def takes_no_mask(model: PreTrainedModel) -> bool:
    """Return whether a tiny input without a mask gets the states that a mask of ones gives it."""
    token_ids = torch.arange(min(4, find_decoder(model).out_features), device=model.device)[None]
    with evaluation_mode(model), torch.inference_mode():
        expected = hidden_before_decoder(
            model, input_ids=token_ids, attention_mask=torch.ones_like(token_ids)
        )
        try:
            found = hidden_before_decoder(model, input_ids=token_ids)
        except Exception:  # a forward may need a mask, and say so in any way
            return False
    return torch.equal(found, expected)


def find_position_limit(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that the model's positions take; None if any number."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its relatives count positions from the one after the padding's.
            return int(limit if module.padding_idx is None else limit - module.padding_idx - 1)
    return int(limit)


def _find_or_add_hook(decoder: nn.Module) -> _StopAtDecoder:
    hook = _find_hook(decoder)
    if hook is None:
        with _adding_hook:
            hook = _find_hook(decoder)
            if hook is None:  # no other thread has just added it
                hook = _StopAtDecoder()
                decoder.register_forward_pre_hook(hook)
    return hook


def _find_hook(decoder: nn.Module) -> _StopAtDecoder | None:
    for hook in list(decoder._forward_pre_hooks.values()):
        if isinstance(hook, _StopAtDecoder):
            return hook
    return None
