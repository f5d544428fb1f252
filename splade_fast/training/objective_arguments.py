"""ObjectiveArguments: what is trained for, as a dataclass whose fields can be flags."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from splade_fast.negative_cache.negative_cache import STORAGES
from splade_fast.ops.sample import TOP_K_METHODS

LOSSES = ("in_batch", "pointwise", "pairwise", "margin_mse", "kl", "negative_cache")
REGULARIZERS = ("flops", "l1", "df_flops", "anti_zero")
SCHEDULES = ("quadratic", "linear", "constant")
CACHE_EMBEDDINGS = ("sparse", "dense")
CACHE_DTYPES = ("float32", "bfloat16", "float16")
CACHE_SHARINGS = ("replicas", "shards", "own")


def _option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class ObjectiveArguments:
    """Relevance loss, regularisers, negative cache and mini-batches; each field says what it is.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    loss: str = _option(
        "in_batch",
        "in_batch: cross entropy against all documents of the batch; pointwise: BCE of labelled "
        "pairs; pairwise: RankNet of document 0 against the others; margin_mse, kl: distillation "
        "of scores; negative_cache: cross entropy against a cache of documents.",
        LOSSES,
    )
    temperature: float = _option(1.0, "Divides the scores of in_batch, negative_cache and kl.")
    query_regularizer: str = _option(
        "flops", f"Of the queries' vectors: {', '.join(REGULARIZERS)}, some joined by +, or none."
    )
    document_regularizer: str = _option("flops", "Of the documents' vectors, likewise.")
    lambda_query: float = _option(
        5e-5, "Final weight of the queries' regulariser, anti_zero excepted."
    )
    lambda_document: float = _option(
        3e-5, "Final weight of the documents' regulariser, anti_zero excepted."
    )
    lambda_anti_zero: float = _option(1.0, "Weight of anti_zero, which no schedule changes.")
    regularizer_schedule: str = _option(
        "quadratic", "How lambda_query and lambda_document rise.", SCHEDULES
    )
    regularizer_steps: int = _option(0, "Steps until they have risen; 0: at once.")
    flops_threshold_query: int | None = _option(
        None, "flops leaves queries alone that have at most so many active terms."
    )
    flops_threshold_document: int | None = _option(
        None, "flops leaves documents alone that have at most so many active terms."
    )
    df_alpha: float = _option(0.1, "df_flops: the document frequency whose weight is 1/2.")
    df_beta: float = _option(10.0, "df_flops: how steep the weight is there.")
    df_momentum: float = _option(
        0.99,
        "df_flops: what the running estimate of the document frequencies keeps from step to step.",
    )
    query_top_k: int | None = _option(None, "Keep the k largest entries of a query's vector.")
    document_top_k: int | None = _option(None, "Keep the k largest entries of a document's vector.")
    cache_size: int = _option(0, "negative_cache: how many documents the caches of all ranks hold.")
    cache_embeddings: str = _option(
        "sparse", "What the cache stores of a vector: its cache_k largest entries, or all.",
        CACHE_EMBEDDINGS,
    )  # fmt: skip
    cache_k: int = _option(256, "Entries of a vector in a sparse cache.")
    cache_dtype: str = _option("float32", "Of the cached vectors.", CACHE_DTYPES)
    cache_top_k: int | None = _option(
        None, "Count and draw only so many cached documents of each query; by default all."
    )
    cache_top_k_method: str = _option(
        "grouped", "grouped: the best of each of cache_top_k parts of the cache.", TOP_K_METHODS
    )
    cache_negatives: int = _option(1, "Negatives drawn for each query.")
    cache_in_batch: bool = _option(
        True,
        "The other positives of this rank's batch count and are drawn as well; hard negatives "
        "always do.",
    )
    cache_exclude: bool = _option(True, "A query's own positive never is its negative.")
    cache_document_length: int = _option(256, "Tokens that the cache has room for per document.")
    cache_sharing: str = _option(
        "replicas",
        "With several ranks: replicas: each has all cache_size documents, the same; shards: each "
        "has a part of one cache; own: each has a part, which the others do not see.",
        CACHE_SHARINGS,
    )
    cache_storage: str = _option("device", "Where the cached documents are.", STORAGES)
    mini_batch_size: int | None = _option(
        None, "Encode so many texts at a time, once more for the gradient; by default all at once."
    )

    def __post_init__(self) -> None:
        self.check_objective()

    def check_objective(self) -> None:
        """Raises ValueError where a field is out of range, or two do not go together."""
        check_choices(self, ObjectiveArguments)
        for name in ("lambda_query", "lambda_document", "lambda_anti_zero"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")
        if not 0 < self.df_alpha < 1:
            raise ValueError(f"df_alpha must be between 0 and 1, got {self.df_alpha}")
        if not self.df_beta > 0:
            raise ValueError(f"df_beta must be greater than 0, got {self.df_beta}")
        if not 0 <= self.df_momentum < 1:
            raise ValueError(f"df_momentum must be at least 0 and below 1, got {self.df_momentum}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for side in ("query", "document"):
            terms = regularizer_terms(f"{side}_regularizer", getattr(self, f"{side}_regularizer"))
            threshold = f"flops_threshold_{side}"
            if getattr(self, threshold) is not None and "flops" not in terms:
                raise ValueError(
                    f"{threshold} must be None without flops in {side}_regularizer, "
                    f"got {getattr(self, threshold)}"
                )
        if self.loss == "negative_cache" and self.cache_size < 1:
            raise ValueError(
                f"cache_size must be at least 1 for the loss negative_cache, got {self.cache_size}"
            )
        if self.loss != "negative_cache" and self.cache_size:
            raise ValueError(
                f"cache_size must be 0 for the loss {self.loss}, which has no cache, "
                f"got {self.cache_size}"
            )


_LEAST = {
    "regularizer_steps": 0,
    "flops_threshold_query": 0,
    "flops_threshold_document": 0,
    "query_top_k": 1,
    "document_top_k": 1,
    "cache_size": 0,
    "cache_k": 1,
    "cache_top_k": 1,
    "cache_negatives": 1,
    "cache_document_length": 1,
    "mini_batch_size": 1,
}


def regularizer_terms(name: str, joined: str) -> tuple[str, ...]:
    """The terms of a regulariser such as "flops+anti_zero"; () for "none".

    Args:
        name: of the argument, for messages.
        joined: the terms.

    Raises:
        ValueError: a term is unknown or there twice.
    """
    if joined == "none":
        return ()
    terms = tuple(term.strip() for term in joined.split("+"))
    if not set(terms) <= set(REGULARIZERS) or len(set(terms)) < len(terms):
        raise ValueError(
            f"{name} must be 'none' or some of {', '.join(REGULARIZERS)}, each once, joined by +, "
            f"got {joined!r}"
        )
    return terms


def check_choices(arguments: Any, kind: type) -> None:
    """The fields of the dataclass `kind` that have choices are among them.

    Raises:
        ValueError: naming one that is not.
    """
    for option in fields(kind):
        choices, value = option.metadata.get("choices"), getattr(arguments, option.name)
        if choices is not None and value not in choices:
            raise ValueError(f"{option.name} must be one of {', '.join(choices)}, got {value!r}")
