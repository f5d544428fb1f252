"""BagOfWordsQueryEncoder: queries as weighted bags of words, without a transformer."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from splade_fast._atomic_files import whole_folder
from splade_fast._checks import check_floating, check_mask
from splade_fast.encoders.pretrained import (
    EncoderSettings,
    find_file,
    hub_arguments,
    load_tokenizer,
    read_json,
    static_embedding_files,
    static_embedding_settings,
    write_json_files,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows

_WEIGHTS_FILE = "model.safetensors"
_TEXTS_AT_A_TIME = 1024


class BagOfWordsQueryEncoder(TextEncoder):
    """y[v] = weight[v] if the query contains token v, else 0: inference-free queries.

    For documents of a SpladeEncoder (Geng et al., arXiv:2411.04403). How often a token occurs does
    not matter, and there are no special tokens, as in sentence-transformers'
    SparseStaticEmbedding, whose folders it reads and writes.

    Args:
        tokenizer: that of the document encoder.
        weight: (V,) floating point; ones by default.
        settings: maximum length and prompts.
        frozen: the weights are constants, such as IDF, and no parameters to learn.

    Raises:
        TypeError, ValueError: weight is no floating-point vector.
    """

    adds_special_tokens = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weight: Tensor | None = None,
        settings: EncoderSettings | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__(tokenizer, settings)
        if weight is None:
            weight = torch.ones(len(tokenizer))
        check_floating("weight", weight)
        if weight.ndim != 1 or len(weight) < len(tokenizer):
            raise ValueError(
                f"weight must be (vocabulary,) with at least the tokenizer's {len(tokenizer)} "
                f"tokens, got {tuple(weight.shape)}"
            )
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=not frozen)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        *,
        frozen: bool = True,
    ) -> BagOfWordsQueryEncoder:
        """Weights log(1 + (N - n[v] + 0.5) / (n[v] + 0.5)), BM25's IDF, of N texts.

        Args:
            texts: the documents, or a sample of them; n[v] of them contain token v.
            tokenizer: that of the document encoder.
            vocab_size: V, `vocab_size` of the document encoder; by default len(tokenizer).
            frozen: as in the constructor.

        Raises:
            ValueError: vocab_size is smaller than the tokenizer's vocabulary.
        """
        weight = _inverse_document_frequencies(texts, tokenizer, vocab_size or len(tokenizer))
        return cls(tokenizer, weight, frozen=frozen)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, subfolder: str = "", **kwargs: Any
    ) -> BagOfWordsQueryEncoder:
        """Load a saved one, or a SparseEncoder folder of one SparseStaticEmbedding.

        Args:
            name_or_path: a hub name or a folder.
            subfolder: where in it the SparseStaticEmbedding is, if it is one of several modules.
            kwargs: `revision`, `token`, `cache_dir` and the like.

        Raises:
            OSError: nothing of that name was found.
            ValueError: the folder describes something else.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        unknown = sorted(set(kwargs) - set(hub))
        if unknown:
            raise ValueError(f"kwargs must be arguments of the hub, got {', '.join(unknown)}")
        settings = static_embedding_settings(name, hub, subfolder)
        hub["subfolder"] = settings.subfolder
        config = read_json(name, "config.json", hub) or {}
        tokenizer = load_tokenizer(name, hub)
        frozen = config.get("frozen", False)
        if "path" in config:  # {token: weight}
            by_token = read_json(name, config["path"], hub)
            if by_token is None:
                raise ValueError(f"config.json of {name} names {config['path']}, which is missing")
            weight = torch.zeros(len(tokenizer))
            weight[tokenizer.convert_tokens_to_ids(list(by_token))] = torch.tensor(
                list(by_token.values()), dtype=weight.dtype
            )
        else:
            path = find_file(name, _WEIGHTS_FILE, hub)
            if path is None:
                raise OSError(f"{name} must hold a {_WEIGHTS_FILE}, got none")
            tensors = load_file(path)
            if "weight" not in tensors:
                raise ValueError(f"{path} must hold weight, got {', '.join(tensors) or 'nothing'}")
            weight = tensors["weight"]
        return cls(tokenizer, weight, settings, frozen=frozen).eval()

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of every vector."""
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors' values."""
        return self.weight.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        """Vectors (B, V), differentiable in the weights.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), nonzero counts; all count without it.

        Raises:
            TypeError, ValueError: the mask is not (B, L), or no bool, int or float.
        """
        return torch.where(self._contained(input_ids, attention_mask), self.weight, 0)

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """The vectors of `tokenize`'s output, at most the k largest entries of each.

        Negative weights are entries too, zero ones are not.
        """
        contained = self._contained(inputs["input_ids"], inputs["attention_mask"])
        # Ranks instead of weights, since from_dense keeps what is positive; ties: lowest first.
        order = self.weight.argsort(descending=True, stable=True)
        ranks = torch.empty(self.vocab_size, dtype=torch.float64, device=self.device)
        ranks[order] = torch.arange(self.vocab_size, 0, -1, dtype=ranks.dtype, device=self.device)
        rows = SparseRows.from_dense(torch.where(contained & (self.weight != 0), ranks, 0), k)
        values = self.weight[rows.indices.clamp(min=0)].masked_fill(rows.indices < 0, 0)
        return SparseRows(rows.indices, values, rows.lengths, self.vocab_size)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for `from_pretrained` and for sentence-transformers' SparseEncoder.

        It is written whole or not at all; see `splade_fast._atomic_files`.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.settings.max_length is not None:  # the folder has no other place for it
            tokenizer.model_max_length = self.length_limit(self.settings.max_length)
        frozen = not self.weight.requires_grad
        with whole_folder(path) as folder:
            tokenizer.save_pretrained(folder)
            save_file({"weight": self.weight.detach()}, folder / _WEIGHTS_FILE, {"format": "pt"})
            write_json_files(folder, static_embedding_files(self.settings, frozen))

    def _contained(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, V), whether a token is at a position that counts."""
        batch, length = input_ids.shape
        counts = torch.ones_like(input_ids)
        if attention_mask is not None:
            mask = check_mask(attention_mask, batch, length, "input_ids", input_ids)
            counts = mask.to(input_ids.dtype)
        times = counts.new_zeros(batch, self.vocab_size)
        return times.scatter_add(1, input_ids, counts) > 0


def _inverse_document_frequencies(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor:
    frequencies = torch.zeros(max(vocab_size, len(tokenizer)), dtype=torch.float64)
    for first in range(0, len(texts), _TEXTS_AT_A_TIME):
        batch = list(texts[first : first + _TEXTS_AT_A_TIME])
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            frequencies[list(set(ids))] += 1
    rarity = (len(texts) - frequencies + 0.5) / (frequencies + 0.5)
    return torch.log1p(rarity[:vocab_size]).float()
