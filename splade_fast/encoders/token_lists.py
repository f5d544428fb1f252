"""Token ids of texts, straight from the backend of a fast tokenizer where that gives the same.

For a short text the checks and copies around the backend take several times as long as it. A single
text is encoded in the calling thread: a batch wakes the threads of the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

from splade_fast.encoders.threads import tokenizer_lock

_METHODS = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")


def token_lists(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    add_special_tokens: bool,
) -> dict[str, list[list[int]]]:
    """Return what the tokenizer returns for texts, padded behind them to the longest one.

    Args:
        tokenizer: the tokenizer.
        texts: at least one text.
        max_length: number of tokens kept of each text.
        add_special_tokens: whether special tokens surround each text.
    """
    with tokenizer_lock(tokenizer):
        kind: Any = type(tokenizer)
        if is_plain(kind):
            is_set = len(texts) == 1 and _is_set(tokenizer, max_length)
            if is_set or tokenizer.pad_token is not None:  # padding needs one
                if not is_set:
                    _set(tokenizer, max_length)
                return _from_backend(tokenizer, texts, add_special_tokens)
        return dict(tokenizer(texts, **tokenizer_options(max_length, add_special_tokens)))


def tokenizer_options(max_length: int, add_special_tokens: bool) -> dict[str, Any]:
    """Return the arguments with which a tokenizer cuts texts and pads them behind."""
    return {
        "truncation": True,
        "max_length": max_length,
        "padding": True,
        # Models with absolute positions count them from the first column.
        "padding_side": "right",
        "add_special_tokens": add_special_tokens,
    }


@cache
def is_plain(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Return whether a class of tokenizers calls its backend as transformers' fast ones do."""
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in _METHODS)
        and not hasattr(kind, "_switch_to_input_mode")
    )


def _is_set(tokenizer: Any, max_length: int) -> bool:
    """Return whether the backend cuts a single text to a length, and does not pad it."""
    backend = tokenizer.backend_tokenizer
    padding = backend.padding
    return (
        padding is not None
        and padding["length"] is None
        and padding["pad_to_multiple_of"] is None
        and backend.truncation
        == {
            "max_length": max_length,
            "stride": 0,
            "strategy": TruncationStrategy.LONGEST_FIRST.value,
            "direction": tokenizer.truncation_side,
        }
    )


def _set(tokenizer: Any, max_length: int) -> None:
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.LONGEST,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side="right",
    )


def _from_backend(
    tokenizer: Any, texts: Sequence[str], add_special_tokens: bool
) -> dict[str, list[list[int]]]:
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    if len(texts) == 1:
        encodings = [backend.encode(texts[0], add_special_tokens=add_special_tokens)]
    else:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    names = tokenizer.model_input_names
    lists = {"input_ids": [encoding.ids for encoding in encodings]}
    if "token_type_ids" in names:
        lists["token_type_ids"] = [encoding.type_ids for encoding in encodings]
    if "attention_mask" in names:
        lists["attention_mask"] = [encoding.attention_mask for encoding in encodings]
    return lists
