"""Names of the columns of sparse vectors."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def name_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return {column: token} of a tokenizer; a model may have further columns without a token."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {column: token for token, column in vocabulary.items()}
