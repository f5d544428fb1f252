"""Loss of sentence-transformers over a streaming negative cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from splade_fast.encoders.batching import without_padding
from splade_fast.encoders.hidden_states import find_decoder
from splade_fast.encoders.text_ids import text_ids
from splade_fast.losses import in_batch_loss
from splade_fast.negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    DistributedCacheClassificationLoss,
    FixedLenFeature,
    GumbelMaxRetrievalFn,
    Scale,
    SparseFeature,
)
from splade_fast.negative_cache.handlers import SHARINGS

Features = dict[str, Any]

_EMBEDDING = "embedding"


class NegativeCacheLoss(nn.Module):
    """Loss -log softmax([q · d⁺, q · E] / temperature)[0] over all cached documents E.

    Every query is trained against the whole cache. The loss draws one document, or
    `cache_negatives`, from the softmax and encodes it again with gradients. The positives of the
    batch then replace the oldest documents. The cache stores pruned sparse vectors and the tokens
    of the documents. Use the loss alone, or in a SpladeLoss for its regularisers.

    The options have the names of `splade_fast.training.ObjectiveArguments`.

    In evaluation mode, or without gradients, the loss is the cross entropy against the positives of
    the batch, without copies of a query's own, and the cache does not change. Trainers do not save
    losses: give the trainer a `NegativeCacheCallback`.

    Source: Lindgren, Reddi, Guo, Kumar: Efficient Training of Retrieval Models using Negative
    Cache, NeurIPS 2021.

    Example::

        >>> from sentence_transformers import SparseEncoder
        >>> from splade_fast.integrations.sentence_transformers import NegativeCacheLoss
        >>> model = SparseEncoder("CHECKPOINT").train()
        >>> loss = NegativeCacheLoss(model, cache_size=100, cache_document_length=16)
        >>> columns = model.preprocess(["fast animal"]), model.preprocess(["A quick fox."])
        >>> loss(columns).backward()
        >>> loss.handler.cache.valid.sum()
        tensor(1)

    Args:
        model: the SparseEncoder.
        cache_size: number of documents in the cache of one process.
        cache_k: number of largest entries stored of a document's vector.
        cache_dtype: dtype of the stored values, or its name such as "bfloat16".
        cache_document_length: maximum number of tokens stored of a document, including special
            tokens. Longer documents lose their last tokens.
        temperature: divisor of the scores.
        cache_negatives: number of documents drawn and encoded again for each query.
        cache_in_batch: whether the other positives of the batch are candidates as well.
        cache_exclude: whether to leave out documents with the tokens of the query's positive.
        cache_top_k: number of cached documents in the softmax of each query; None: all.
        cache_top_k_method: "grouped" or "exact", see `CacheClassificationLoss`.
        cache_use_lru: whether a document that is encoded again counts as new.
        cache_storage: "device", or "pinned" for host memory.
        cache_sharing: caches of several processes: "own" for separate caches, "replicas" for
            copies of one cache, or "shards" for parts of one cache.
        seed: seed of the draws; None: a seed from torch's default generator.

    Raises:
        ValueError: an argument is out of range, or the model takes no text.
    """

    def __init__(
        self,
        model: SparseEncoder,
        cache_size: int = 131_072,
        *,
        cache_k: int = 256,
        cache_dtype: torch.dtype | str = torch.float32,
        cache_document_length: int = 256,
        temperature: float = 1.0,
        cache_negatives: int = 1,
        cache_in_batch: bool = True,
        cache_exclude: bool = True,
        cache_top_k: int | None = None,
        cache_top_k_method: str = "grouped",
        cache_use_lru: bool = True,
        cache_storage: str = "device",
        cache_sharing: str = "own",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if cache_sharing not in SHARINGS:
            raise ValueError(
                f"cache_sharing must be one of {', '.join(SHARINGS)}, got {cache_sharing!r}"
            )
        if cache_document_length < 1:
            raise ValueError(
                f"cache_document_length must be at least 1, got {cache_document_length}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        self._inputs = _EncodedInputs()
        self.model = model
        self.cache_document_length = cache_document_length
        self.temperature = temperature
        self.cache_sharing = cache_sharing
        specs = _token_specs(model, cache_document_length)
        self._token_keys = tuple(specs)
        dtype = getattr(torch, cache_dtype) if isinstance(cache_dtype, str) else cache_dtype
        specs[_EMBEDDING] = SparseFeature(_vector_size(model), cache_k, dtype)
        keys: dict[str, Any] = {"embedding_key": _EMBEDDING, "data_keys": self._token_keys}
        has_shards = cache_sharing == "shards"
        loss = DistributedCacheClassificationLoss if has_shards else CacheClassificationLoss
        cache_loss = loss(
            **keys,
            score_transform=Scale(1 / temperature),
            top_k=cache_top_k,
            top_k_method=cache_top_k_method,
            num_negatives=cache_negatives,
            in_batch=cache_in_batch,
            exclude=("input_ids", "attention_mask") if cache_exclude else None,
            retrieval_fn=GumbelMaxRetrievalFn(seed=seed),
        )
        manager = CacheManager(specs, cache_size, cache_use_lru, storage=cache_storage)
        self.handler = CacheLossHandler(
            manager, cache_loss, **keys, use_cross_replica=cache_sharing == "replicas"
        )
        self.metrics: dict[str, float] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Follow a trainer that replaces `model` by a wrapped or new one."""
        if name == "model":
            self._inputs.listen_to(_unwrap(value))
        super().__setattr__(name, value)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch.

        Args:
            sentence_features: features of the queries and of their positives, as the model's
                `preprocess` returns them.
            labels: ignored.

        Raises:
            ValueError: the number of columns is not two.
        """
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(columns, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch that the model has just encoded.

        SpladeLoss calls this method.

        Args:
            embeddings: vectors of the queries and of their positives, (B, V) each.
            labels: ignored.

        Raises:
            ValueError: the number of columns is not two.
            RuntimeError: the model did not encode the batch with gradients, as in CachedSpladeLoss.
        """
        if len(embeddings) != 2:
            raise ValueError(
                "embeddings must be two columns, queries and their positives, "
                f"got {len(embeddings)}"
            )
        queries, positives = embeddings
        if not (torch.is_grad_enabled() and _unwrap(self.model).training):
            evaluated = self._inputs.find(len(queries))
            ids = None if evaluated is None else text_ids(evaluated)
            self._inputs.forget()
            return in_batch_loss(queries, positives, document_ids=ids, temperature=self.temperature)
        documents = self._inputs.take(len(queries))
        tokens = self._stored_tokens(documents)
        others = {n: value for n, value in documents.items() if not isinstance(value, Tensor)}

        def encode(cached: Mapping[str, Any]) -> Tensor:
            features = {name: table.long() for name, table in without_padding(cached).items()}
            vectors: Tensor = self.model(features | others)["sentence_embedding"]
            return vectors

        result = self.handler.step(encode, queries, positives, tokens)
        self._inputs.forget()
        self.metrics = {
            "cache/interpretable_prediction_loss": float(result.interpretable_loss),
            "cache/staleness": float(result.staleness),
        }
        return result.training_loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options that the model card lists."""
        manager = self.handler.cache_manager
        embedding: Any = manager.specs[_EMBEDDING]
        return {
            "cache_size": manager.cache_size,
            "cache_k": embedding.k,
            "cache_document_length": self.cache_document_length,
            "temperature": self.temperature,
            "cache_negatives": self.handler.cache_loss.num_negatives,
            "cache_in_batch": self.handler.cache_loss.in_batch,
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{lindgren2021efficient,
    title={Efficient Training of Retrieval Models using Negative Cache},
    author={Erik Lindgren and Sashank J. Reddi and Ruiqi Guo and Sanjiv Kumar},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021}
}
"""

    def _stored_tokens(self, documents: Features) -> dict[str, Tensor]:
        """Return the features of the first `cache_document_length` tokens of each document."""
        missing = [name for name in self._token_keys if name not in documents]
        if missing:
            raise ValueError(f"the features must have {missing[0]!r}, got {sorted(documents)}")
        return {name: documents[name][:, : self.cache_document_length] for name in self._token_keys}


class _EncodedInputs:
    """Features of the last batch that the model encoded with gradients or to evaluate a loss.

    SpladeLoss passes only vectors to the loss, so a hook of the model records the features. The
    hook does not refer to the loss, so the model can be sent to other processes without the cache.
    """

    def __init__(self) -> None:
        self._last: Features | None = None
        self._handle: Any = None

    def listen_to(self, model: nn.Module) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        # In inference mode `encode` runs, without a loss.
        is_evaluated = not (model.training or torch.is_inference_mode_enabled())
        has_gradients = model.training and torch.is_grad_enabled()
        self._last = _unflatten(args[0]) if has_gradients or is_evaluated else None

    def __reduce__(self) -> Any:
        return _EncodedInputs, ()

    def take(self, count: int) -> Features:
        """Return the features of the `count` rows that were encoded last.

        Raises:
            RuntimeError: the rows were encoded without gradients, or not as one batch of documents.
        """
        found = self.find(count)
        if found is None:
            rows = len((self._last or {}).get("input_ids", ()))
            raise RuntimeError(
                "NegativeCacheLoss needs the embeddings that its model has just encoded with "
                f"gradients, {count} positives, and saw {rows}; it works alone and in SpladeLoss, "
                "not in CachedSpladeLoss"
            )
        return found

    def find(self, count: int) -> Features | None:
        """Return the features of the `count` rows that were encoded last, None if unknown."""
        last = self._last or {}
        rows = len(last.get("input_ids", ()))
        # SpladeLoss encodes the positives in a call of their own, or after the queries in one call.
        if rows not in (count, 2 * count):
            return None
        return {
            name: value[rows - count :] if isinstance(value, Tensor) else value
            for name, value in last.items()
        }

    def forget(self) -> None:
        """Drop the features, also those of the documents that the loss itself has encoded."""
        self._last = None


def _unflatten(features: Features) -> Features:
    """Return a copy of token features as (B, L), padded if they were flattened."""
    if "cu_seq_lens_q" not in features:
        return dict(features)
    lengths = features["cu_seq_lens_q"].diff()
    rows = features["input_ids"].squeeze(0).split(lengths.tolist())
    longest = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    padded = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": (longest < lengths.unsqueeze(1)).long(),
    }
    return padded | {n: v for n, v in features.items() if not isinstance(v, Tensor | int)}


def _token_specs(model: SparseEncoder, length: int) -> dict[str, Any]:
    """Return specs of the features that have an entry for each token of a document."""
    task = {"task": "document"} if isinstance(model[0], Router) else {}
    features = _unflatten(model.preprocess(["text"], **task))
    if "input_ids" not in features or "attention_mask" not in features:
        raise ValueError(
            f"model must return token ids and an attention mask, got features {sorted(features)}"
        )
    shape = features["input_ids"].shape
    padding = getattr(model.tokenizer, "pad_token_id", None) or 0
    return {
        name: FixedLenFeature([length], torch.int32, padding if name == "input_ids" else 0)
        for name, value in features.items()
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
    }


def _vector_size(model: SparseEncoder) -> int:
    """Return V. SpladePooling knows V only after its first call."""
    transformer: Any = model.transformers_model
    if transformer is None:
        return int(model.get_embedding_dimension() or 0)
    return find_decoder(transformer).out_features


def _unwrap(model: Any) -> Any:
    """Return the SparseEncoder inside DistributedDataParallel, DataParallel or torch.compile."""
    while not isinstance(model, SparseEncoder):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise TypeError(f"model must be a SparseEncoder, got {type(model).__name__}")
        model = inner
    return model
