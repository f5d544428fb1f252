"""TrainingModel: encoders and objective as one module, whose forward is a training step's loss."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.negative_cache.checkpoint import load_sharded, save_sharded
from splade_fast.ops.prune import prune_topk
from splade_fast.training.gradient_cache import cached_encode
from splade_fast.training.objective import Objective, ObjectiveArguments


class TrainingModel(nn.Module):
    """Encoder(s) and objective.

    Args:
        encoder: of documents, and of queries where there is no other.
        arguments: what is trained for.
        query_encoder: of the queries; None: `encoder`.
        seed: of the draws from the cache.

    Raises:
        ValueError: the encoders' vocabularies differ, or the arguments do not fit each other.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        arguments: ObjectiveArguments,
        *,
        query_encoder: TextEncoder | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.step = 0  # what the schedules go by; whoever trains sets it
        self.encoder = encoder
        # A module that is registered twice would have all its weights twice in the state.
        self._own_query_encoder = None if query_encoder is encoder else query_encoder
        if self.query_encoder.vocab_size != encoder.vocab_size:
            raise ValueError(
                f"query_encoder must have the vocab_size of encoder, {encoder.vocab_size}, "
                f"got {self.query_encoder.vocab_size}"
            )
        self.objective = Objective(
            arguments, encoder.vocab_size, tokenizer=encoder.tokenizer, seed=seed
        )
        # DistributedDataParallel would overwrite the cache of each rank by that of the first.
        self._ddp_params_and_buffers_to_ignore = [
            f"objective.{name}" for name, _ in self.objective.named_buffers()
        ]

    @property
    def query_encoder(self) -> TextEncoder:
        """The encoder of the queries, which may be that of the documents."""
        return self.encoder if self._own_query_encoder is None else self._own_query_encoder

    def forward(
        self,
        queries: Mapping[str, Tensor],
        documents: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch and its parts.

        Args:
            queries: the tokenizer's output for B texts.
            documents: that for m * B texts, row j * B + i is document j of query i.
            labels: (B,) or (B, m), see `Objective.forward`.

        Returns:
            {"loss": scalar, "metrics": {name: detached scalar}}.

        Raises:
            ValueError: the batch does not fit the loss.
        """
        arguments = self.objective.arguments
        counts = [len(inputs["input_ids"]) for inputs in (queries, documents)]
        self.objective.check_batch(counts[0], counts[1], labels, documents)
        query_vectors = self._encoded(self.query_encoder, queries, arguments.query_top_k)

        def encode_documents(inputs: Mapping[str, Tensor]) -> Tensor:
            return self._encoded(self.encoder, inputs, arguments.document_top_k)

        result: dict[str, Any] = self.objective(
            query_vectors,
            encode_documents(documents),
            labels,
            step=self.step,
            network=encode_documents,
            inputs=documents,
        )
        return result

    def cache_state(self) -> dict[str, Tensor]:
        """What the objective of this rank remembers from step to step: its cache, the generator of
        the draws, document frequencies. The tensors themselves; none for most objectives.
        """
        state: dict[str, Tensor] = self.objective.state_dict()
        return state

    def load_cache_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `cache_state` returned.

        Raises:
            RuntimeError: the state is that of another objective.
        """
        self.objective.load_state_dict(state)

    def save_cache(self, folder: str | os.PathLike[str]) -> None:
        """Write `cache_state` into a folder, as safetensors; all ranks call it with one folder.

        Nothing is written where there is nothing to remember.

        Raises:
            ValueError: the folder holds the files of another number of ranks.
        """
        if self.cache_state():
            save_sharded(self.objective, folder, replicated=self._replicated())

    def load_cache(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save_cache` wrote, with any number of ranks; all ranks call it.

        Raises:
            FileNotFoundError: there are no files, or not all of them.
            ValueError: they are those of another objective.
        """
        if self.cache_state():
            load_sharded(self.objective, folder, replicated=self._replicated())

    def _replicated(self) -> bool:
        """Whether all ranks remember the same."""
        arguments = self.objective.arguments
        return self.objective.handler is None or arguments.cache_sharing == "replicas"

    def _encoded(
        self, encoder: TextEncoder, inputs: Mapping[str, Tensor], top_k: int | None
    ) -> Tensor:
        """(N, V)."""
        size = self.objective.arguments.mini_batch_size
        vectors = cached_encode(encoder, inputs, size) if size else encoder(**inputs)
        return vectors if top_k is None else prune_topk(vectors, top_k)
