"""BagOfWordsQueryEncoder: an encoder of queries into bags of words, without a transformer."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from splade_fast._checks import check_floating, check_mask, check_texts
from splade_fast.encoders.pretrained import (
    find_file,
    hub_arguments,
    load_tokenizer,
    read_json_object,
    write_json_files,
)
from splade_fast.encoders.settings import (
    EncoderSettings,
    read_static_embedding_settings,
    refuse_splade_options,
    static_embedding_files,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.encoders.threads import tokenizer_lock
from splade_fast.encoders.weights import read_weights
from splade_fast.encoders.whole_weights import save_whole
from splade_fast.ops.sparse_rows import SparseRows

_WEIGHTS_FILE = "model.safetensors"
_BATCH_SIZE = 1024


class BagOfWordsQueryEncoder(TextEncoder):
    """Encode queries as y[v] = weight[v] if the query contains token v, else 0.

    The documents are encoded by a SpladeEncoder (Geng et al., arXiv:2411.04403). Repeated tokens
    count once, and no special tokens are added. The encoder equals sentence-transformers'
    SparseStaticEmbedding, and reads and writes its folders.

    Args:
        tokenizer: the tokenizer of the document encoder.
        weight: (V,), floating point; ones by default.
        settings: maximum length and prompts.
        frozen: keep the weights constant, for example if they are IDF, instead of learning them.

    Raises:
        TypeError: weight is not a floating-point tensor.
        ValueError: weight is not (V,) or smaller than the tokenizer's vocabulary.

    Example::

        >>> documents = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> encoder = sf.BagOfWordsQueryEncoder(documents.tokenizer)
        >>> encoder.top_terms(encoder.encode("quick quick fox", show_progress=False))
        [{'quick': 1.0, 'fox': 1.0}]
    """

    has_special_tokens = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weight: Tensor | None = None,
        settings: EncoderSettings | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__(tokenizer, settings)
        refuse_splade_options("settings.", asdict(self.settings))
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
        """Weigh token v by BM25's IDF, log(1 + (N - n[v] + 0.5) / (n[v] + 0.5)).

        Args:
            texts: N documents or a sample of them; n[v] of them contain token v.
            tokenizer: the tokenizer of the document encoder.
            vocab_size: `vocab_size` of the document encoder, V; by default len(tokenizer).
            frozen: keep the weights constant instead of learning them.

        Raises:
            TypeError: texts is a single str, or one of them is none.
            ValueError: there is no text, a text holds a lone surrogate, or vocab_size is smaller
                than the tokenizer's vocabulary.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be several texts, got a single str")
        if len(texts) == 0:
            raise ValueError("texts must hold at least one text, got none")
        check_texts("texts", texts)
        weight = _inverse_document_frequencies(texts, tokenizer, vocab_size or len(tokenizer))
        return cls(tokenizer, weight, frozen=frozen)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, subfolder: str = "", **kwargs: Any
    ) -> BagOfWordsQueryEncoder:
        """Load a saved BagOfWordsQueryEncoder, or the SparseStaticEmbedding of a SparseEncoder.

        Args:
            name_or_path: a hub name or a folder.
            subfolder: folder of the SparseStaticEmbedding; by default the only module, or the only
                one in a Router's route for queries.
            kwargs: `revision`, `token`, `cache_dir` and other arguments of the hub.

        Raises:
            OSError: no folder of that name was found, or it holds no tokenizer.
            ValueError: the folder describes something else, a file is damaged, or the files do not
                fit together.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        unknown = sorted(set(kwargs) - set(hub))
        if unknown:
            raise ValueError(f"kwargs must be arguments of the hub, got {', '.join(unknown)}")
        settings = read_static_embedding_settings(name, hub, subfolder)
        hub["subfolder"] = settings.subfolder
        config = read_json_object(name, "config.json", hub)
        tokenizer = load_tokenizer(name, hub)
        if "path" in config:
            weight = _read_json_weight(name, config["path"], tokenizer, hub)
        else:
            weight = _read_weight(name, hub)
        return cls(tokenizer, weight, settings, frozen=config.get("frozen", False)).eval()

    @property
    def vocab_size(self) -> int:
        """Number of columns of every vector, V."""
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors' values."""
        return self.weight.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        """Return vectors (B, V), differentiable in the weights.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), zero at padding; by default nothing is padding.

        Raises:
            TypeError: the mask is not a tensor of bool, int or float.
            ValueError: the mask is not (B, L).
        """
        return torch.where(self._term_mask(input_ids, attention_mask), self.weight, 0)

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """Return the vectors of `tokenize`'s output, with at most the k largest entries of each.

        Negative weights are entries as well; weights of zero are not.
        """
        term_mask = self._term_mask(inputs["input_ids"], inputs["attention_mask"])
        # from_dense keeps positive values only, so it selects by rank. Ties go to the lowest token.
        order = self.weight.argsort(descending=True, stable=True)
        ranks = torch.empty(self.vocab_size, dtype=torch.float64, device=self.device)
        ranks[order] = torch.arange(self.vocab_size, 0, -1, dtype=ranks.dtype, device=self.device)
        rows = SparseRows.from_dense(torch.where(term_mask & (self.weight != 0), ranks, 0), k)
        values = self.weight[rows.indices.clamp(min=0)].masked_fill(rows.indices < 0, 0)
        return SparseRows(rows.indices, values, rows.lengths, self.vocab_size)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for `from_pretrained` and for sentence-transformers' SparseEncoder.

        The folder appears complete or not at all. Of an encoder that FSDP2 has sharded, all ranks
        call it and the first one writes.

        Args:
            path: the folder; existing files of the same names are replaced.
        """
        save_whole(self, path, self._write_files)

    def _write_files(self, folder: Path) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.settings.max_length is not None:  # only the tokenizer's files can store it
            tokenizer.model_max_length = self.length_limit(self.settings.max_length)
        frozen = not self.weight.requires_grad
        tokenizer.save_pretrained(folder)
        save_file({"weight": self.weight.detach()}, folder / _WEIGHTS_FILE, {"format": "pt"})
        write_json_files(folder, static_embedding_files(self.settings, frozen))

    def _term_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return (B, V), true for the tokens that a query contains."""
        batch, length = input_ids.shape
        counted = torch.ones_like(input_ids)
        if attention_mask is not None:
            mask = check_mask(attention_mask, batch, length, "input_ids", input_ids)
            counted = mask.to(input_ids.dtype)
        occurrences = counted.new_zeros(batch, self.vocab_size)
        return occurrences.scatter_add(1, input_ids, counted) > 0


def _read_weight(name: str, hub: dict[str, Any]) -> Tensor:
    path = find_file(name, _WEIGHTS_FILE, hub)
    if path is None:
        raise OSError(f"{name} must hold a {_WEIGHTS_FILE}, got none")
    tensors = read_weights(path)
    if "weight" not in tensors:
        raise ValueError(f"{path} must hold weight, got {', '.join(tensors) or 'nothing'}")
    return tensors["weight"]


def _read_json_weight(
    name: str, file: str, tokenizer: PreTrainedTokenizerBase, hub: dict[str, Any]
) -> Tensor:
    """Read the weights of a JSON file {token: weight}; other tokens weigh 0."""
    weights = read_json_object(name, file, hub)
    if not weights:
        raise ValueError(f"config.json of {name} names {file}, which is missing or empty")
    if not all(isinstance(weight, int | float) for weight in weights.values()):
        raise ValueError(f"{file} of {name} must hold a number for each token")
    weight = torch.zeros(len(tokenizer))
    weight[tokenizer.convert_tokens_to_ids(list(weights))] = torch.tensor(
        list(weights.values()), dtype=weight.dtype
    )
    return weight


def _inverse_document_frequencies(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor:
    frequencies = torch.zeros(max(vocab_size, len(tokenizer)), dtype=torch.float64)
    for first in range(0, len(texts), _BATCH_SIZE):
        batch = list(texts[first : first + _BATCH_SIZE])
        # Whole documents are counted, so the warning of texts longer than the model's limit is off.
        with tokenizer_lock(tokenizer):
            encoding = tokenizer(batch, add_special_tokens=False, verbose=False)
        for ids in encoding["input_ids"]:
            frequencies[list(set(ids))] += 1
    rarity = (len(texts) - frequencies + 0.5) / (frequencies + 0.5)
    return torch.log1p(rarity[:vocab_size]).float()
