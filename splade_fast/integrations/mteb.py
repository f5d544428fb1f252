"""MTEBEncoder: an encoder as a model of the benchmark MTEB.

An accelerated `SparseEncoder` needs no wrapper: `mteb.evaluate` takes it as it takes any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from splade_fast._checks import check_count
from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.ops.score import sparse_scores
from splade_fast.ops.sparse_rows import SparseRows

__all__ = ["MTEBEncoder"]


class MTEBEncoder:
    """Model for `mteb.evaluate` of mteb ≥ 2, which scores by inner products of sparse vectors.

    Tasks that search get sparse vectors. Others, whose classifiers need matrices, get dense ones.

    The prompt of a text is the encoder's prompt of the first of these names that it has: the task's
    name with the role ("NFCorpus-query"), the task's name, its type with the role
    ("Retrieval-query"), its type, the role ("query" or "document"), else the default prompt. This
    is the order of mteb.

    Args:
        encoder: encoder of the documents, and of texts of symmetric tasks.
        query_encoder: encoder of the queries; None uses `encoder`.
        name: name of the model in results, "organization/model".
        max_length: number of tokens kept of each text.
        document_top_k: number of entries kept of each document's vector; None keeps all.

    Raises:
        TypeError: a count is not an integer.
        ValueError: name is not of this form, the vocabularies of the encoders differ, or a count is
            less than 1.

    Example::

        >>> from splade_fast.integrations.mteb import MTEBEncoder
        >>> model = MTEBEncoder(sf.SpladeEncoder.from_pretrained("CHECKPOINT"))
        >>> vectors = torch.eye(3).to_sparse()
        >>> model.similarity(vectors, vectors).shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        encoder: TextEncoder,
        query_encoder: TextEncoder | None = None,
        *,
        name: str = "splade_fast/encoder",
        max_length: int = 256,
        document_top_k: int | None = None,
    ) -> None:
        if name.count("/") != 1 or not all(name.split("/")):
            raise ValueError(f"name must be 'organization/model', got {name!r}")
        self.encoder = encoder
        self.query_encoder = encoder if query_encoder is None else query_encoder
        check_vocabularies(encoder, self.query_encoder)
        self.name = name
        self.max_length = check_count("max_length", max_length, 1)
        self.document_top_k = (
            None if document_top_k is None else check_count("document_top_k", document_top_k, 1)
        )

    @property
    def mteb_model_meta(self) -> Any:
        """Metadata of the model, an `mteb.models.ModelMeta`."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty(
            {
                "name": self.name,
                "n_parameters": sum(one.numel() for one in self.encoder.parameters()),
                "embed_dim": self.encoder.vocab_size,
                "max_tokens": float(self.encoder.length_limit(self.max_length)),
                "framework": ["PyTorch"],
                "model_type": ["sparse"],
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        **_: Any,
    ) -> Tensor:
        """Return the vectors (N, V) of a task's texts, sparse (COO) or dense, on the CPU.

        Args:
            inputs: batches with the key "text".
            task_metadata: metadata of the task: its name, type and simplified type.
            hf_split, hf_subset: part of the task's data, which does not matter here.
            prompt_type: "query", "document" or None for texts of symmetric tasks.
            batch_size: number of texts that the model encodes at a time.
            show_progress_bar: draw a progress bar.
        """
        role = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        encoder = self.query_encoder if role == "query" else self.encoder
        rows = encoder.encode(
            [text for batch in inputs for text in batch["text"]],
            k=self.document_top_k if role == "document" else None,
            batch_size=batch_size,
            max_length=self.max_length,
            show_progress=show_progress_bar,
            prompt_name=_choose_prompt(encoder, task_metadata, role),
        )
        is_search = task_metadata.simplified_task_type == "retrieval"
        # A reranking task indexes the vectors, which torch's sparse tensors do not allow.
        if is_search and "Reranking" not in task_metadata.type:
            sparse: Tensor = rows.to_torch_csr().to_sparse_coo()
            return sparse
        return rows.to_dense().float()

    def similarity(self, embeddings1: Tensor, embeddings2: Tensor) -> Tensor:
        """Return the inner products (N₁, N₂) of vectors, sparse or dense.

        Args:
            embeddings1: (N₁, V), or (V,) for one vector.
            embeddings2: (N₂, V), or (V,).
        """
        first, second = (_rows(vectors) for vectors in (embeddings1, embeddings2))
        return sparse_scores(first, second)

    def similarity_pairwise(self, embeddings1: Tensor, embeddings2: Tensor) -> Tensor:
        """Return the inner products (N,) of vectors with the same number.

        Args:
            embeddings1, embeddings2: (N, V), sparse or dense.
        """
        first, second = (_rows(vectors).to_dense() for vectors in (embeddings1, embeddings2))
        return torch.einsum("nv,nv->n", first, second)


def _choose_prompt(encoder: TextEncoder, task: Any, role: str | None) -> str | None:
    """Return the name of the encoder's prompt for a task and a role."""
    names = [task.name, task.type]
    if role is not None:
        names = [f"{task.name}-{role}", task.name, f"{task.type}-{role}", task.type]
    found = next((name for name in names if name in encoder.settings.prompts), None)
    return encoder.settings.prompt_for(role or "") if found is None else found


def _rows(vectors: Any) -> SparseRows:
    tensor = torch.as_tensor(vectors).cpu()
    tensor = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
    if tensor.layout == torch.strided:
        return SparseRows.from_dense(tensor)
    return SparseRows.from_torch_csr(tensor.to_sparse_csr())
