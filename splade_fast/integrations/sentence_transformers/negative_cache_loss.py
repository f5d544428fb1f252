"""The streaming negative cache as a loss of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from splade_fast.encoders.hidden_states import find_decoder
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

Features = dict[str, Any]

SHARING = ("own", "replicas", "shards")

_EMBEDDING = "embedding"


class NegativeCacheLoss(nn.Module):
    """-log softmax([q · d⁺, q · E])[0] over all cached documents E, by a drawn negative.

    Lindgren et al., NeurIPS 2021: every query is trained against the whole cache, of which one
    document (or `num_negatives`) is drawn from the softmax and encoded again, with gradients. The
    batch's positives then replace the oldest documents. Use it alone, or in a SpladeLoss for its
    regularizers. The cache stores pruned sparse vectors and the documents' tokens.

    Where gradients are off, or the model evaluates, the loss is the cross entropy against the
    batch's positives, and the cache stays as it is. The trainer does not save losses: give it a
    `NegativeCacheCallback`.

    Args:
        model: the SparseEncoder.
        cache_size: documents in the cache.
        k: entries stored of each document's vector, the largest.
        dtype: of the stored values.
        document_length: tokens stored of each document, special ones included; of longer ones the
            first so many.
        scale: factor of the scores.
        num_negatives: drawn and encoded again for each query.
        in_batch: the other positives of the batch count and are drawn as well.
        exclude: documents with the tokens of the query's own positive neither count nor are drawn.
        top_k: count only so many documents of each query; None: all.
        top_k_method: "grouped" or "exact".
        use_lru: documents encoded again count as new.
        storage: of the cache: "device", or "pinned" in host memory.
        sharing: with several processes: "own" caches, "replicas" of one, or "shards" of one.
        seed: of the draws; None: from torch's default generator.

    Raises:
        ValueError: an argument is out of range, or the model has no text input.
    """

    def __init__(
        self,
        model: SparseEncoder,
        cache_size: int = 131_072,
        *,
        k: int = 256,
        dtype: torch.dtype = torch.float32,
        document_length: int = 256,
        scale: float = 1.0,
        num_negatives: int = 1,
        in_batch: bool = True,
        exclude: bool = True,
        top_k: int | None = None,
        top_k_method: str = "grouped",
        use_lru: bool = True,
        storage: str = "device",
        sharing: str = "own",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if sharing not in SHARING:
            raise ValueError(f"sharing must be one of {', '.join(SHARING)}, got {sharing!r}")
        if document_length < 1:
            raise ValueError(f"document_length must be at least 1, got {document_length}")
        self._inputs = _Inputs()
        self.model = model
        self.document_length = document_length
        self.scale = scale
        self.sharing = sharing
        specs = _token_specs(model, document_length)
        self._token_keys = tuple(specs)
        specs[_EMBEDDING] = SparseFeature(_vector_size(model), k, dtype)
        keys: dict[str, Any] = {"embedding_key": _EMBEDDING, "data_keys": self._token_keys}
        loss = (
            DistributedCacheClassificationLoss if sharing == "shards" else CacheClassificationLoss
        )
        cache_loss = loss(
            **keys,
            score_transform=Scale(scale),
            top_k=top_k,
            top_k_method=top_k_method,
            num_negatives=num_negatives,
            in_batch=in_batch,
            exclude=("input_ids", "attention_mask") if exclude else None,
            retrieval_fn=GumbelMaxRetrievalFn(seed=seed),
        )
        manager = CacheManager(specs, cache_size, use_lru, storage=storage)
        self.handler = CacheLossHandler(
            manager, cache_loss, **keys, use_cross_replica=sharing == "replicas"
        )
        self.metrics: dict[str, float] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Trainers put a wrapped or new model in place of the one they were given."""
        if name == "model":
            self._inputs.listen_to(_unwrapped(value))
        super().__setattr__(name, value)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: of the queries and of their positives, as the tokenizer gives them.
            labels: not used.

        Raises:
            ValueError: there are not two columns.
        """
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(columns, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch that the model has just encoded, as SpladeLoss calls it.

        Args:
            embeddings: queries and positives, (B, V) each.
            labels: not used.

        Raises:
            ValueError: there are not two columns.
            RuntimeError: the model did not encode them with gradients, as in CachedSpladeLoss.
        """
        if len(embeddings) != 2:
            raise ValueError(
                "NegativeCacheLoss takes two columns, queries and their positives, "
                f"got {len(embeddings)}"
            )
        queries, positives = embeddings
        if not (torch.is_grad_enabled() and _unwrapped(self.model).training):
            return in_batch_loss(queries * self.scale, positives)
        documents = self._inputs.take(len(queries))
        tokens = self._stored_tokens(documents)
        others = {n: value for n, value in documents.items() if not isinstance(value, Tensor)}

        def encode(cached: Mapping[str, Any]) -> Tensor:
            features = {name: table.long() for name, table in _trimmed(cached).items()}
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
        """What the model card says of the loss."""
        manager = self.handler.cache_manager
        embedding: Any = manager.specs[_EMBEDDING]
        return {
            "cache_size": manager.cache_size,
            "k": embedding.k,
            "document_length": self.document_length,
            "scale": self.scale,
            "num_negatives": self.handler.cache_loss.num_negatives,
            "in_batch": self.handler.cache_loss.in_batch,
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
        """The first tokens of each document, padded."""
        missing = [name for name in self._token_keys if name not in documents]
        if missing:
            raise ValueError(f"the features must have {missing[0]!r}, got {sorted(documents)}")
        return {name: documents[name][:, : self.document_length] for name in self._token_keys}


class _Inputs:
    """What the model encoded last with gradients: the features, without their vectors.

    A hook of the model, since SpladeLoss hands on vectors alone. It holds no reference to the loss,
    so that the model can be sent to other processes without the cache.
    """

    def __init__(self) -> None:
        self._last: Features | None = None
        self._handle: Any = None

    def listen_to(self, model: nn.Module) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        with_gradients = model.training and torch.is_grad_enabled()
        self._last = _padded(args[0]) if with_gradients else None

    def __reduce__(self) -> Any:
        return _Inputs, ()

    def take(self, count: int) -> Features:
        """The features of the `count` rows that were encoded last.

        Raises:
            RuntimeError: they were not encoded with gradients, or not as documents of one batch.
        """
        last = self._last or {}
        rows = len(last.get("input_ids", ()))
        # The positives are a call of their own, or the second half of one for both columns.
        if rows not in (count, 2 * count):
            raise RuntimeError(
                "NegativeCacheLoss needs the embeddings that its model has just encoded with "
                f"gradients, {count} positives, and saw {rows}; it works alone and in SpladeLoss, "
                "not in CachedSpladeLoss"
            )
        return {
            name: value[rows - count :] if isinstance(value, Tensor) else value
            for name, value in last.items()
        }

    def forget(self) -> None:
        """What the loss itself had encoded."""
        self._last = None


def _padded(features: Features) -> Features:
    """A copy of (B, L) token features; flattened ones are padded."""
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


def _trimmed(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row."""
    used = tokens["attention_mask"].any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return {name: table[:, :length] for name, table in tokens.items()}


def _token_specs(model: SparseEncoder, length: int) -> dict[str, Any]:
    """What is stored of a document's tokens: the features of a text that have its length."""
    task = {"task": "document"} if isinstance(model[0], Router) else {}
    features = _padded(model.preprocess(["text"], **task))
    if "input_ids" not in features or "attention_mask" not in features:
        raise ValueError(
            f"model must give token ids and a mask of texts, got features {sorted(features)}"
        )
    shape = features["input_ids"].shape
    padding = getattr(model.tokenizer, "pad_token_id", None) or 0
    return {
        name: FixedLenFeature([length], torch.int32, padding if name == "input_ids" else 0)
        for name, value in features.items()
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
    }


def _vector_size(model: SparseEncoder) -> int:
    """V. SpladePooling knows it only once it has pooled."""
    transformer: Any = model.transformers_model
    if transformer is None:
        return int(model.get_embedding_dimension() or 0)
    return find_decoder(transformer).out_features


def _unwrapped(model: Any) -> Any:
    """Without DistributedDataParallel, DataParallel and torch.compile."""
    while not isinstance(model, SparseEncoder):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise TypeError(f"model must be a SparseEncoder, got {type(model).__name__}")
        model = inner
    return model
