"""Direction of attention of decoder models: causal, or bidirectional for encoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splade_fast.encoders.hidden_states import (
    find_decoder,
    has_key_value_cache,
    hidden_before_decoder,
)
from splade_fast.encoders.threads import evaluation_mode

BIDIRECTIONAL, CAUSAL = "bidirectional", "causal"
ATTENTIONS = {BIDIRECTIONAL: 0, CAUSAL: 1}


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Let every token attend to all tokens, or to the tokens up to itself alone.

    The switch is `is_causal` of the model's config, which transformers applies to models that make
    their masks by `create_causal_mask`, and which is saved in config.json. Tiny texts show whether
    the model follows it. A sliding window stays, on both sides then.

    Args:
        model: a transformers language model; a model that attends so already does not change.
        attention: "bidirectional" or "causal".

    Raises:
        ValueError: the model does not follow the switch, and is as it was.
    """
    before = find_attention(model)
    if before == attention:
        return
    config: Any = model.config.get_text_config()
    has_switch, value = hasattr(config, "is_causal"), getattr(config, "is_causal", None)
    config.is_causal = attention == CAUSAL
    if find_attention(model) != attention:
        if has_switch:
            config.is_causal = value
        else:
            del config.is_causal
        raise ValueError(
            f"attention must be {before!r}, the only one of {type(model).__name__} in the "
            f"installed transformers, got {attention!r}"
        )


def find_attention(model: PreTrainedModel) -> str | None:
    """Return "bidirectional" if the first of two tokens depends on the second, else "causal".

    Return None if this differs between texts with and without padding, for which transformers
    chooses other masks.
    """
    found = {
        CAUSAL if torch.equal(first, second) else BIDIRECTIONAL
        for padding in (0, 1)
        for first, second in [[_hidden_of_first_token(model, last, padding) for last in (0, 1)]]
    }
    return found.pop() if len(found) == 1 else None


@torch.inference_mode()
def _hidden_of_first_token(model: PreTrainedModel, last: int, padding: int) -> Tensor:
    """Return the decoder's input for the first of the tokens 0 and `last`, with padding behind."""
    device = find_decoder(model).weight.device
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[0, last] + [0] * padding], device=device),
        "attention_mask": torch.tensor([[1, 1] + [0] * padding], device=device),
    }
    if has_key_value_cache(model):
        inputs["use_cache"] = False
    with evaluation_mode(model):
        return hidden_before_decoder(model, **inputs)[0, 0]
