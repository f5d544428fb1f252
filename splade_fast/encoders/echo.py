"""Texts that are given twice, so that the tokens of the second copy follow the whole text.

A causal language model shows each token the tokens before it, which for the second copy are the
whole text (echo embeddings, Springer et al., arXiv:2402.15449).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

POOLING_MASK = "pooling_mask"


def tokenize_echoed(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompt: str,
    echo: str,
    options: dict[str, Any],
) -> BatchEncoding:
    """Tokenize prompt + text + echo + text, with both copies cut to the same characters.

    Args:
        tokenizer: a tokenizer that knows the characters of each token.
        texts: the texts.
        prompt: text before the first copy.
        echo: text between the copies.
        options: arguments of the tokenizer, with `max_length` and `add_special_tokens`.

    Returns:
        The tokenizer's inputs and pooling_mask, 1 at the tokens of the second copy.

    Raises:
        ValueError: the tokenizer is slow, or max_length leaves no room for two copies.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "echo needs a fast tokenizer, which finds the tokens of a text, "
            f"got {type(tokenizer).__name__}"
        )
    max_length = options["max_length"]
    frame = len(
        tokenizer(prompt + echo, add_special_tokens=options["add_special_tokens"])["input_ids"]
    )
    room = (max_length - frame) // 2
    if room < 1:
        raise ValueError(
            f"max_length must be at least {frame + 2} for two copies of a text with their prompt, "
            f"got {max_length}"
        )
    copies = _cut(tokenizer, texts, room)
    encoding: BatchEncoding = tokenizer(
        [prompt + copy + echo + copy for copy in copies], return_offsets_mapping=True, **options
    )
    ends = np.array(encoding.pop("offset_mapping"))[..., 1]
    starts = np.array([len(prompt) + len(copy) + len(echo) for copy in copies])
    # A token may begin with the end of the echo; special tokens and padding end at 0.
    encoding[POOLING_MASK] = (ends > starts[:, None]).astype(np.int64)
    return encoding


def _cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], room: int) -> list[str]:
    """Return the beginnings of texts that have at most `room` tokens."""
    offsets = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=True,
        max_length=room,
        return_offsets_mapping=True,
    )["offset_mapping"]
    return [
        text[: spans[-1][1]] if spans else "" for text, spans in zip(texts, offsets, strict=True)
    ]
