"""What all encoders share: texts in, sparse vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from splade_fast._checks import check_count
from splade_fast.encoders.batching import batches_by_tokens, longest_first
from splade_fast.encoders.pretrained import EncoderSettings
from splade_fast.ops.sparse_rows import SparseRows


def token_tensors(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    add_special_tokens: bool = True,
) -> dict[str, Tensor]:
    """Inputs of a transformer on the CPU, padded to the longest of at least one text."""
    encoding = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        padding=True,
        add_special_tokens=add_special_tokens,
    )
    # numpy reads lists three times as fast as torch.
    return {name: torch.from_numpy(np.array(lists)) for name, lists in encoding.items()}


def check_positive(**numbers: int | None) -> None:
    """Refuse the arguments, given by name, that are less than 1; None is none.

    Raises:
        TypeError: naming the first that is no integer.
        ValueError: naming the first that is less.
    """
    for name, number in numbers.items():
        if number is not None:
            check_count(name, number, 1)


class TextEncoder(nn.Module):
    """Base of the encoders: tokenizing, batching and naming the terms; see the subclasses.

    A subclass has a forward (input_ids, attention_mask) -> (B, V) and says what `vocab_size`,
    `dtype` and `sparse_rows` are.
    """

    adds_special_tokens = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.settings = settings or EncoderSettings()

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of every vector."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors' values."""
        raise NotImplementedError

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """The vectors of `tokenize`'s output, at most the k largest entries of each."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are and the inputs have to be."""
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str], max_length: int = 256) -> dict[str, Tensor]:
        """Inputs of `forward` on the model's device, padded to the longest text.

        Args:
            texts: at least one text.
            max_length: tokens kept of each text, special ones included; never more than the
                model's own limit.
        """
        tokens = token_tensors(
            self.tokenizer, texts, self.length_limit(max_length), self.adds_special_tokens
        )
        return {name: tensor.to(self.device) for name, tensor in tokens.items()}

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
        """One sparse vector per text, in the order of the texts, in CPU memory.

        Args:
            texts: any number of texts; a single string counts as one text.
            k: keep at most the k largest entries of each vector.
            batch_size: texts of about as many tokens that go through the model together.
            max_length: tokens kept of each text, special ones included; never more than the
                model's own limit.
            show_progress: draw a progress bar.
            prompt_name: which of `settings.prompts` goes before each text; by default the
                model's default prompt, which most models do not have.

        Returns:
            SparseRows of len(texts) rows; a single string gives one row.

        Raises:
            TypeError, ValueError: an argument is out of range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{position}] must be a str, got {type(text).__name__}")
        check_positive(batch_size=batch_size, max_length=max_length, k=k)
        prompt = self.prompt_text(prompt_name)
        with tqdm(total=len(texts), unit="text", disable=not show_progress) as progress:
            return self.encode_batches(texts, prompt, k, batch_size, max_length, progress.update)

    @torch.inference_mode()
    def encode_batches(
        self,
        texts: Sequence[str],
        prompt: str,
        k: int | None,
        batch_size: int,
        max_length: int,
        after_batch: Callable[[int], object],
    ) -> SparseRows:
        """What `encode` does once it has checked its arguments.

        Args:
            texts, k, batch_size, max_length: as of `encode`.
            prompt: goes before each text.
            after_batch: called with the number of texts of each batch that is through.
        """
        order: list[Tensor] = []
        parts: list[SparseRows] = []
        was_training = self.training
        self.eval()
        try:
            for places in longest_first([len(text) for text in texts], batch_size):
                inputs = self.tokenize([prompt + texts[i] for i in places.tolist()], max_length)
                for rows, batch in batches_by_tokens(inputs, batch_size):
                    parts.append(self.sparse_rows(batch, k).to("cpu"))
                    order.append(places[rows])
                    after_batch(len(rows))
        finally:
            self.train(was_training)
        if not parts:
            return self._no_rows()
        return SparseRows.cat(parts)[torch.cat(order).argsort()]

    def top_terms(self, rows: SparseRows, count: int | None = None) -> list[dict[str, float]]:
        """{token: weight} of the `count` heaviest entries of each row, heaviest first."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        return [
            dict(sorted(weights.items(), key=lambda item: -item[1])[:count])
            for weights in rows.to_dicts(names)
        ]

    def length_limit(self, max_length: int) -> int:
        """max_length, or what the model takes where that is less."""
        # tokenizer.model_max_length is a huge number where the tokenizer knows no limit.
        limits = [max_length, self.tokenizer.model_max_length]
        if self.settings.max_length is not None:
            limits.append(self.settings.max_length)
        return min(limits)

    def prompt_text(self, name: str | None) -> str:
        """What goes before a text: the prompt of that name, or the model's default one.

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

    def _no_rows(self) -> SparseRows:
        return SparseRows.from_dense(torch.empty(0, self.vocab_size, dtype=self.dtype))
