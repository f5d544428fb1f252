"""TrainingModel: encoders and objective in one module that returns the loss of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from splade_fast.encoders.text_encoder import TextEncoder, check_vocabularies
from splade_fast.negative_cache.checkpoint import load_sharded, save_sharded
from splade_fast.ops.prune import prune_topk
from splade_fast.training.gradient_cache import cached_encode
from splade_fast.training.objective import Objective, ObjectiveArguments


class TrainingModel(nn.Module):
    """Compute the objective on the vectors of one or two encoders.

    Args:
        encoder: encoder of the documents.
        arguments: arguments of the objective.
        query_encoder: encoder of the queries; None uses `encoder`.
        seed: seed of the draws from the negative cache.

    Raises:
        ValueError: the vocabularies of the encoders differ, or arguments contradict each other.

    Example::

        >>> from splade_fast.training import ObjectiveArguments, TrainingModel
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> model = TrainingModel(encoder, ObjectiveArguments(loss="in_batch"))
        >>> queries = encoder.tokenize(["fox", "dog"])
        >>> documents = encoder.tokenize(["a quick fox", "the lazy dog"])
        >>> model(queries, documents)["loss"].shape
        torch.Size([])
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
        self.step = 0  # of the schedules; the training loop sets it
        self.encoder = encoder
        # Registering the same module twice would put its weights into the state twice.
        self._own_query_encoder = None if query_encoder is encoder else query_encoder
        check_vocabularies(encoder, self.query_encoder)
        self.objective = Objective(
            arguments,
            encoder.vocab_size,
            tokenizer=encoder.tokenizer,
            seed=seed,
            has_pooling_mask=encoder.settings.echo is not None,
        )
        # DistributedDataParallel would overwrite each rank's cache with the first rank's.
        self._ddp_params_and_buffers_to_ignore = [
            f"objective.{name}" for name, _ in self.objective.named_buffers()
        ]

    @property
    def query_encoder(self) -> TextEncoder:
        """Encoder of the queries, which may be the encoder of the documents."""
        return self.encoder if self._own_query_encoder is None else self._own_query_encoder

    def forward(
        self,
        queries: Mapping[str, Tensor],
        documents: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the loss of a batch and its metrics.

        Args:
            queries: tokenized texts of the B queries.
            documents: tokenized texts of the m · B documents; row j · B + i is document j of
                query i.
            labels: (B,) or (B, m), as `Objective.forward` takes them.

        Returns:
            {"loss": scalar, "metrics": {name: detached scalar}}.

        Raises:
            ValueError: the batch does not fit the loss.
        """
        arguments = self.objective.arguments
        counts = [len(inputs["input_ids"]) for inputs in (queries, documents)]
        self.objective.check_batch(counts[0], counts[1], labels, documents)
        query_vectors = self._encode(self.query_encoder, queries, arguments.query_top_k)

        def encode_documents(inputs: Mapping[str, Tensor]) -> Tensor:
            return self._encode(self.encoder, inputs, arguments.document_top_k)

        result: dict[str, Any] = self.objective(
            query_vectors,
            encode_documents(documents),
            labels,
            step=self.step,
            network=encode_documents,
            inputs=documents,
            query_inputs=queries,
        )
        return result

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return function(*args, **kwargs) of a function that runs the encoders.

        Under FSDP2 the weights outside of layers are whole while the function runs.
        """
        return function(*args, **kwargs)

    def cache_state(self) -> dict[str, Tensor]:
        """Return the tensors that the objective of this rank keeps from step to step.

        They are the negative cache, the generator of its draws, and document frequencies. They are
        not copied. Most objectives have none.
        """
        state: dict[str, Tensor] = self.objective.state_dict()
        return state

    def load_cache_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a `cache_state` into the objective.

        Raises:
            RuntimeError: the state belongs to another objective.
        """
        self.objective.load_state_dict(state)

    def save_cache(self, folder: str | os.PathLike[str]) -> None:
        """Write `cache_state` into a folder as safetensors, or nothing if it is empty.

        All ranks must call it with the same folder.

        Raises:
            ValueError: the folder holds the files of another number of ranks.
        """
        if self.cache_state():
            save_sharded(self.objective, folder, replicated=self.is_cache_replicated)

    def load_cache(self, folder: str | os.PathLike[str]) -> None:
        """Read the files of `save_cache`, which any number of ranks may have written.

        All ranks must call it with the same folder.

        Raises:
            FileNotFoundError: files are missing.
            ValueError: the files belong to another objective.
        """
        if self.cache_state():
            load_sharded(self.objective, folder, replicated=self.is_cache_replicated)

    @property
    def is_cache_replicated(self) -> bool:
        """Whether `cache_state` is the same on all ranks."""
        arguments = self.objective.arguments
        return self.objective.handler is None or arguments.cache_sharing == "replicas"

    def _encode(
        self, encoder: TextEncoder, inputs: Mapping[str, Tensor], top_k: int | None
    ) -> Tensor:
        """Return the vectors (N, V) with at most top_k entries each."""
        arguments = self.objective.arguments
        size, tokens = arguments.mini_batch_size, arguments.mini_batch_tokens
        if size is None and tokens is None:
            vectors = encoder(**inputs)
        else:
            vectors = cached_encode(encoder, inputs, size, mini_batch_tokens=tokens)
        return vectors if top_k is None else prune_topk(vectors, top_k)
