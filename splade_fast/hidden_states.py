"""The input of a language model's decoder, computed without the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


class _DecoderReached(Exception):  # noqa: N818 (no error: a way out)
    """Carries the decoder's input out of the model's own forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def decoder_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that turns hidden states into logits over the vocabulary.

    Raises:
        ValueError: the model has none, or it is not a plain linear layer.
    """
    decoder = model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        raise ValueError(
            f"{type(model).__name__}.get_output_embeddings() must be a torch.nn.Linear, "
            f"got {type(decoder).__name__}"
        )
    return decoder


def hidden_before_decoder(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the decoder would be given: (B, L, D), with the gradient graph behind it.

    Any family works, because the model's own forward runs up to the decoder and is left there
    by an exception. Nothing of the model changes, and the logits never exist.

    Raises:
        ValueError: the model's forward does not call its decoder.
    """
    handle = decoder_of(model).register_forward_pre_hook(_leave_with_input)
    try:
        model(**inputs)
    except _DecoderReached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} does not call its output embeddings as a module")


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
                logits = model(**inputs).logits
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


def _leave_with_input(decoder: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _DecoderReached(args[0])
