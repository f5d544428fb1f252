"""Collator that turns examples into batches of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splade_fast._checks import check_count, check_unicode
from splade_fast.encoders.text_encoder import TextEncoder, token_tensors
from splade_fast.search.texts import DataError
from splade_fast.training.data.layout import Kind, infer_kind
from splade_fast.training.data.rows import parse_label, parse_numbers


class TrainingCollator:
    """Turn examples of one kind into the keyword arguments of `TrainingModel.forward`.

    Args:
        encoder: encoder of the documents.
        query_encoder: encoder of the queries; None uses `encoder`.
        max_query_length: number of tokens kept of each query, including special tokens and the
            prompt; the model's own limit may be lower.
        max_document_length: number of tokens kept of each document, likewise.
        query_prompt: name of the prompt before each query; None uses "query" where the model has
            that prompt, else its default.
        document_prompt: name of the prompt before each document; None uses "document", likewise.
        negatives_per_query: number m - 1 of negatives to take from each example, the first ones.
            A scored list gives its first document and m - 1 others. None takes all documents, of
            which all examples of a batch must have equally many.

    Raises:
        TypeError, ValueError: a length or number is not an integer of at least 1, a model lacks
            the prompt, or the prompt leaves no room for a text.

    Example::

        >>> from splade_fast.training import TrainingCollator
        >>> collator = TrainingCollator(sf.SpladeEncoder.from_pretrained("CHECKPOINT"))
        >>> batch = collator([{"query": "quick fox", "document": "a quick brown fox"}])
        >>> batch["documents"]["input_ids"].shape
        torch.Size([1, 6])
    """

    def __init__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        max_query_length: int = 64,
        max_document_length: int = 256,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        negatives_per_query: int | None = None,
    ) -> None:
        for name, number in (
            ("max_query_length", max_query_length),
            ("max_document_length", max_document_length),
            ("negatives_per_query", negatives_per_query),
        ):
            if number is not None:
                check_count(name, number, 1)
        self.negatives_per_query = negatives_per_query
        self._queries = _SideTokenizer.make(
            query_encoder or encoder, "query", query_prompt, max_query_length
        )
        self._documents = _SideTokenizer.make(
            encoder, "document", document_prompt, max_document_length
        )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some examples, on the CPU.

        Args:
            examples: B ≥ 1 examples of one kind, in the columns of load_training_data.

        Returns:
            {"queries": tokens (B, L), "documents": tokens (m · B, L')}, where row j · B + i is
            document j of query i. Labelled pairs add "labels" (B,), scored lists "labels" (B, m).

        Raises:
            DataError: the examples are of different kinds, have too few or unequally many
                negatives, or hold something other than texts, labels from 0 to 1 and finite
                scores.
            ValueError: a text holds a lone surrogate, or the model lacks a token of the tokenizer.
        """
        if not examples:
            raise DataError("a batch must have at least one example, got none")
        kind = infer_kind(examples[0])
        if any(set(example) != set(examples[0]) for example in examples):
            raise DataError(f"all examples of a batch must be {kind}, as its first one")
        for number, example in enumerate(examples):
            _check_texts(example, number)
        lists, scores = _split_examples(examples, kind)
        count = self._count_documents_per_query([len(documents) for documents in lists])
        batch: dict[str, Any] = {
            "queries": self._queries([example["query"] for example in examples]),
            "documents": self._documents(
                [documents[j] for j in range(count) for documents in lists]
            ),
        }
        if kind == "labelled pairs":
            batch["labels"] = torch.tensor(
                [parse_label(parse_numbers(example["label"], "label")) for example in examples]
            )
        elif kind == "scored lists":
            batch["labels"] = torch.tensor([row[:count] for row in scores], dtype=torch.float32)
        return batch

    def _count_documents_per_query(self, counts: list[int]) -> int:
        """Return m.

        Args:
            counts: number of documents of each example.
        """
        fewest, most = min(counts), max(counts)
        if self.negatives_per_query is None or most == 1:  # pairs have no negatives
            if fewest != most:
                raise DataError(
                    f"examples of a batch must have equally many documents, got {fewest} and "
                    f"{most}; negatives_per_query takes the first ones of each"
                )
            return fewest
        if fewest - 1 < self.negatives_per_query:
            raise DataError(
                f"examples must have at least negatives_per_query = {self.negatives_per_query} "
                f"negatives, got {fewest - 1}"
            )
        return 1 + self.negatives_per_query


def _check_texts(example: Mapping[str, Any], number: int) -> None:
    """Raise an error if an example holds something other than texts, and lists of them."""
    for part in ("query", "document"):
        if part in example:
            _check_text(f"{part} of example {number} of the batch", example[part])
    for part in ("negatives", "documents"):
        texts, name = example.get(part, ()), f"{part} of example {number} of the batch"
        if not isinstance(texts, list | tuple):
            raise DataError(f"{name} must be a list of texts, got {texts!r}")
        for text in texts:
            _check_text(name, text)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise DataError(f"{name} must be text, got {text!r}")
    check_unicode(name, text)


def _split_examples(
    examples: Sequence[Mapping[str, Any]], kind: Kind
) -> tuple[list[list[str]], list[list[float]]]:
    """Return the documents of each example, the positive first, and the scores of scored lists."""
    if kind == "scored lists":
        for example in examples:
            if len(example["documents"]) != len(example["scores"]):
                raise DataError(
                    f"expected {len(example['documents'])} scores, one per document, "
                    f"got {len(example['scores'])}"
                )
        scores = [parse_numbers(example["scores"], "scores") for example in examples]
        return [example["documents"] for example in examples], scores
    return [[e["document"], *e.get("negatives", ())] for e in examples], []


@dataclass
class _SideTokenizer:
    """Tokenizer of queries or documents, without weights: each data loading process copies it."""

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    max_length: int
    has_special_tokens: bool
    vocab_size: int
    echo: str | None

    @classmethod
    def make(
        cls, encoder: TextEncoder, role: str, prompt_name: str | None, max_length: int
    ) -> _SideTokenizer:
        """Return the tokenizer of an encoder for its role, "query" or "document"."""
        name = prompt_name if prompt_name is not None else encoder.settings.prompt_for(role)
        made = cls(
            encoder.tokenizer,
            encoder.prompt_text(name),
            encoder.length_limit(max_length),
            encoder.has_special_tokens,
            encoder.vocab_size,
            encoder.settings.echo,
        )
        made._check_room(f"max_{role}_length")
        return made

    def _check_room(self, argument: str) -> None:
        """Raise ValueError if the prompt takes all tokens, which would make all texts equal."""
        if not self.prompt:
            return
        without, with_text = (self([text])["input_ids"].tolist() for text in ("", "text"))
        if without == with_text:
            raise ValueError(
                f"{argument} must be more than the tokens of the prompt {self.prompt!r}, "
                f"got {self.max_length}"
            )

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return token_tensors(
            self.tokenizer,
            texts,
            self.max_length,
            self.has_special_tokens,
            self.vocab_size,
            self.prompt,
            self.echo,
        )
