"""TextEncoder: the base class of all encoders of texts into sparse vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from splade_fast._checks import check_count, check_integer, check_texts
from splade_fast.encoders.batching import batches_by_tokens, longest_first
from splade_fast.encoders.echo import tokenize_echoed
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.sharding import is_sharded, run_sharded
from splade_fast.encoders.threads import evaluation_mode, tokenizer_lock
from splade_fast.encoders.token_lists import token_lists, tokenizer_options
from splade_fast.encoders.token_names import name_tokens
from splade_fast.ops.sparse_rows import SparseRows


def token_tensors(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    add_special_tokens: bool = True,
    vocab_size: int | None = None,
    prompt: str = "",
    echo: str | None = None,
) -> dict[str, Tensor]:
    """Tokenize texts into inputs of a transformer, on the CPU.

    Args:
        tokenizer: the tokenizer.
        texts: at least one text.
        max_length: number of tokens kept of each text, at least that of its special tokens.
        add_special_tokens: whether special tokens surround each text.
        vocab_size: number of tokens that the model knows, if it is to be checked.
        prompt: text that goes before each text.
        echo: text between two copies of each text; None: one copy.

    Returns:
        Tensors (N, L) by name, padded behind the texts to the longest one. With echo, the
        pooling_mask is 1 at the tokens of the second copy.

    Raises:
        TypeError: a text is not a str.
        ValueError: there is no text, a text holds a lone surrogate, the model lacks a token, or
            max_length leaves no room for two copies.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    check_texts("texts", texts)
    found: Mapping[str, Any]
    if echo is None:
        texts = [prompt + text for text in texts] if prompt else texts
        found = token_lists(tokenizer, texts, max_length, add_special_tokens)
    else:
        with tokenizer_lock(tokenizer):
            options = tokenizer_options(max_length, add_special_tokens)
            found = tokenize_echoed(tokenizer, texts, prompt, echo, options)
    # numpy reads lists three times as fast as torch.
    arrays = {name: np.array(lists) for name, lists in found.items()}
    largest = int(arrays["input_ids"].max(initial=0))
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"tokenizer must have the {vocab_size} tokens of the model, got the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}; "
            "resize_token_embeddings adds tokens to a model"
        )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TextEncoder(nn.Module):
    """Base class of the encoders: tokenize texts, sort them into batches, name the terms.

    A subclass implements `forward(input_ids, attention_mask) -> (B, V)`, `vocab_size`, `dtype`
    and `sparse_rows`.

    Args:
        tokenizer: the tokenizer of the model.
        settings: maximum length, prompts and, for some encoders, pooling and activation.
    """

    has_special_tokens = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.settings = settings or EncoderSettings()

    @property
    def vocab_size(self) -> int:
        """Number of columns of every vector, V."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors' values."""
        raise NotImplementedError

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """Return the vectors of `tokenize`'s output, with at most the k largest entries of each."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the parameters, on which inputs must be."""
        return next(self.parameters()).device

    def tokenize(
        self, texts: str | Sequence[str], max_length: int = 256, prompt: str = ""
    ) -> dict[str, Tensor]:
        """Tokenize texts into inputs of `forward`, on the encoder's device.

        Args:
            texts: at least one text; a single string counts as one text.
            max_length: number of tokens kept of each text, special tokens included; the model's
                own limit applies as well. With `settings.echo` it holds both copies.
            prompt: text that goes before each text, such as `prompt_text("query")`.

        Returns:
            Tensors (N, L) by name, padded behind the texts to the longest one.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: there is no text, a text holds a lone surrogate, the model lacks a token of
                the tokenizer, or max_length leaves no room for special tokens or for two copies.
        """
        tokens = token_tensors(
            self.tokenizer,
            [texts] if isinstance(texts, str) else texts,
            self.length_limit(max_length),
            self.has_special_tokens,
            self.vocab_size,
            prompt,
            self.settings.echo,
        )
        device = self.device
        if device.type == "cpu":
            return tokens
        return {name: tensor.to(device) for name, tensor in tokens.items()}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        k: int | None = None,
        batch_size: int = 32,
        max_length: int = 256,
        show_progress: bool = True,
        prompt_name: str | None = None,
    ) -> SparseRows:
        """Encode texts into sparse vectors.

        Args:
            texts: any number of texts; a single string counts as one text.
            k: keep at most the k largest entries of each vector.
            batch_size: number of texts that go through the model together.
            max_length: number of tokens kept of each text, special tokens included; the model's
                own limit applies as well.
            show_progress: draw a progress bar.
            prompt_name: name of the prompt in `settings.prompts` that goes before each text; by
                default the model's default prompt, if there is one.

        Returns:
            SparseRows (N, V) in CPU memory, one row for each text in their order.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range, a text holds a lone surrogate, or no prompt has
                that name.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_texts("texts", texts)
        batch_size = check_count("batch_size", batch_size, 1)
        max_length = check_count("max_length", max_length, 1)
        k = None if k is None else check_count("k", k, 1)
        prompt = self.prompt_text(prompt_name)
        encode = partial(self.encode_batches, texts, prompt, k, batch_size, max_length)
        if not show_progress:  # a disabled bar starts a thread all the same
            return encode(lambda _: None)
        with tqdm(total=len(texts), unit="text") as progress:
            return encode(progress.update)

    def encode_batches(
        self,
        texts: Sequence[str],
        prompt: str,
        k: int | None,
        batch_size: int,
        max_length: int,
        after_batch: Callable[[int], object],
    ) -> SparseRows:
        """Encode texts as `encode` does, without checks of the arguments.

        Args:
            texts, k, batch_size, max_length: see `encode`.
            prompt: text that goes before each text.
            after_batch: function that is called after each batch with its number of texts.
        """
        order: list[Tensor] = []
        parts: list[SparseRows] = []
        with evaluation_mode(self), _without_gradients(self):
            if len(texts) == 1:  # nothing to sort, and a query should not wait for it
                rows = self.sparse_rows(self.tokenize([texts[0]], max_length, prompt), k)
                after_batch(1)
                return _on_cpu(rows)
            for places in longest_first([len(text) for text in texts], batch_size):
                chosen_texts = [texts[i] for i in places.tolist()]
                inputs = self.tokenize(chosen_texts, max_length, prompt)
                for chosen, batch in batches_by_tokens(inputs, batch_size):
                    parts.append(_on_cpu(self.sparse_rows(batch, k)))
                    order.append(places[chosen])
                    after_batch(len(chosen))
        if not parts:
            return SparseRows.from_dense(torch.empty(0, self.vocab_size, dtype=self.dtype))
        return SparseRows.cat(parts)[torch.cat(order).argsort()]

    def top_terms(self, rows: SparseRows, count: int | None = None) -> list[dict[str, float]]:
        """Return the terms of each row by name, heaviest first.

        Args:
            rows: (N, V).
            count: number of terms kept of each row; all by default.

        Returns:
            A dictionary {token: weight} for each row. A column without a token, as where the model
            pads its vocabulary, is named `[#column]`.
        """
        names = name_tokens(self.tokenizer)
        return [
            dict(sorted(weights.items(), key=lambda item: -item[1])[:count])
            for weights in rows.to_dicts(names)
        ]

    @property
    def position_limit(self) -> int | None:
        """Largest number of tokens that the model takes; None if it takes any number."""
        return None

    def length_limit(self, max_length: int) -> int:
        """Return the smallest of `max_length` and the limits of tokenizer, settings and model.

        Raises:
            TypeError: max_length is not an integer.
            ValueError: the special tokens of a text alone are more.
        """
        max_length = check_integer("max_length", max_length)
        # A tokenizer without a limit has a huge model_max_length.
        limits = [max_length, self.tokenizer.model_max_length]
        limits += [m for m in (self.settings.max_length, self.position_limit) if m is not None]
        limit = min(limits)
        special = self.tokenizer.num_special_tokens_to_add() if self.has_special_tokens else 0
        if limit < special:
            raise ValueError(
                f"max_length must be at least {special}, the number of special tokens of a text, "
                f"got {limit}"
            )
        return limit

    def prompt_text(self, name: str | None) -> str:
        """Return the prompt of that name; without a name, the default prompt or an empty string.

        Raises:
            ValueError: the model has no such prompt.
        """
        name = name if name is not None else self.settings.default_prompt_name
        if name is None:
            return ""
        if name not in self.settings.prompts:
            raise ValueError(
                f"prompt_name must be one of {sorted(self.settings.prompts)}, got {name!r}"
            )
        return self.settings.prompts[name]


def check_vocabularies(encoder: TextEncoder, query_encoder: TextEncoder) -> None:
    """Raise ValueError if the encoders of documents and queries have other numbers of columns."""
    if query_encoder.vocab_size != encoder.vocab_size:
        raise ValueError(
            f"query_encoder must have the vocab_size of encoder, {encoder.vocab_size}, "
            f"got {query_encoder.vocab_size}"
        )


def _without_gradients(encoder: TextEncoder) -> AbstractContextManager[None]:
    """Return the context of encoding.

    Weights that FSDP2 gathers in inference mode could not be trained later.
    """
    if not is_sharded(encoder):
        return torch.inference_mode()
    run_sharded(encoder, "sparse_rows")
    return torch.no_grad()


def _on_cpu(rows: SparseRows) -> SparseRows:
    return rows if rows.device.type == "cpu" else rows.to("cpu")
