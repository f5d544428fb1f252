"""Examples of load_training_data in, token tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splade_fast.encoders.text_encoder import TextEncoder, token_tensors
from splade_fast.search.texts import DataError
from splade_fast.training.data.load import kind_of


class TrainingCollator:
    """B examples of one kind -> the keyword arguments of `TrainingModel.forward`, on the CPU.

    Args:
        encoder: encodes the documents.
        query_encoder: encodes the queries; None: the same encoder.
        max_query_length: tokens kept of each query, special ones and the prompt included; never
            more than the model's own limit.
        max_document_length: tokens kept of each document, likewise.
        query_prompt: the name of the prompt before each query; None: "query" where the model has
            that, else its default one.
        document_prompt: the name of the prompt before each document; None: likewise "document".
        negatives_per_query: m - 1, the first so many negatives of each example are taken; of scored
            lists the first document and so many more. None: all, which have to be equally many in
            all examples of a batch.

    Raises:
        ValueError: a length or number is below 1, or a model has no such prompt.
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
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.negatives_per_query = negatives_per_query
        self._queries = _Tokens.of(
            query_encoder or encoder, "query", query_prompt, max_query_length
        )
        self._documents = _Tokens.of(encoder, "document", document_prompt, max_document_length)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch.

        Args:
            examples: B ≥ 1 rows of one kind, in the columns of load_training_data.

        Returns:
            {"queries": tokens (B, L), "documents": tokens (m·B, L'), row j·B + i being document j
            of query i, "labels": (B,) float of labelled pairs, (B, m) of scored lists, else none}.

        Raises:
            DataError: the examples are of different kinds, or have too few or unequally many
                negatives.
        """
        if not examples:
            raise DataError("a batch must have at least one example, got none")
        kind = kind_of(examples[0])
        if any(set(example) != set(examples[0]) for example in examples):
            raise DataError(f"all examples of a batch must be {kind}, as its first one")
        lists, scores = _documents_and_scores(examples, kind)
        count = self._documents_per_query([len(documents) for documents in lists])
        batch: dict[str, Any] = {
            "queries": self._queries([example["query"] for example in examples]),
            "documents": self._documents(
                [documents[j] for j in range(count) for documents in lists]
            ),
        }
        if kind == "labelled pairs":
            batch["labels"] = torch.tensor([float(example["label"]) for example in examples])
        elif kind == "scored lists":
            batch["labels"] = torch.tensor([row[:count] for row in scores], dtype=torch.float32)
        return batch

    def _documents_per_query(self, found: list[int]) -> int:
        """m, of examples with so many documents each."""
        fewest, most = min(found), max(found)
        if self.negatives_per_query is None or most == 1:  # pairs have none
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


def _documents_and_scores(
    examples: Sequence[Mapping[str, Any]], kind: str
) -> tuple[list[list[str]], list[list[float]]]:
    """The documents of each example, the positive first, and the scores of scored lists."""
    if kind == "scored lists":
        for example in examples:
            if len(example["documents"]) != len(example["scores"]):
                raise DataError(
                    f"expected {len(example['documents'])} scores, one per document, "
                    f"got {len(example['scores'])}"
                )
        return [e["documents"] for e in examples], [e["scores"] for e in examples]
    return [[e["document"], *e.get("negatives", ())] for e in examples], []


@dataclass
class _Tokens:
    """How texts of one side become tokens. Holds no weights: processes that load data copy it."""

    tokenizer: PreTrainedTokenizerBase
    prompt: str
    max_length: int
    special: bool

    @classmethod
    def of(cls, encoder: TextEncoder, role: str, prompt_name: str | None, length: int) -> _Tokens:
        name = prompt_name if prompt_name is not None else encoder.settings.prompt_for(role)
        return cls(
            encoder.tokenizer,
            encoder.prompt_text(name),
            encoder.length_limit(length),
            encoder.has_special_tokens,
        )

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        return token_tensors(self.tokenizer, texts, self.max_length, self.special)
