"""Arguments of the objective, as a dataclass whose fields can be command-line flags."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from splade_fast._checks import check_count
from splade_fast.negative_cache.handlers import SHARINGS
from splade_fast.negative_cache.negative_cache import STORAGES
from splade_fast.ops.sample import TOP_K_METHODS

LOSSES = ("in_batch", "pointwise", "pairwise", "margin_mse", "kl", "negative_cache")
REGULARIZERS = ("flops", "l1", "df_flops", "anti_zero")
SCHEDULES = ("quadratic", "linear", "constant")
CACHE_EMBEDDINGS = ("sparse", "dense")
CACHE_DTYPES = ("float32", "bfloat16", "float16")


def _option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class ObjectiveArguments:
    """Arguments of relevance loss, regularisers, negative cache and mini-batches.

    The metadata of each field holds its description.

    Raises:
        TypeError: a field has a wrong type, such as a count that is not an integer.
        ValueError: a field is out of range, or two fields contradict each other.

    Example::

        >>> from splade_fast.training import ObjectiveArguments
        >>> ObjectiveArguments(loss="kl", temperature=2.0).document_regularizer
        'flops'
    """

    loss: str = _option(
        "in_batch",
        "in_batch: cross entropy against all documents of the batch; pointwise: BCE of labelled "
        "pairs; pairwise: RankNet of document 0 against the others; margin_mse, kl: distillation "
        "of scores; negative_cache: cross entropy against a cache of documents. Or several, joined "
        "by +, each with a weight: kl+0.05*margin_mse.",
    )
    temperature: float = _option(1.0, "Divides the scores of in_batch, negative_cache and kl.")
    hardness: float = _option(
        0.0, "Factor of the scores of negatives that in_batch adds to their logits."
    )
    query_regularizer: str = _option(
        "flops", f"Regulariser of the queries: {', '.join(REGULARIZERS)}, joined by +, or none."
    )
    document_regularizer: str = _option(
        "flops", f"Regulariser of the documents: {', '.join(REGULARIZERS)}, joined by +, or none."
    )
    lambda_query: float = _option(
        5e-5, "Final weight of the queries' regulariser, except of anti_zero."
    )
    lambda_document: float = _option(
        3e-5, "Final weight of the documents' regulariser, except of anti_zero."
    )
    lambda_anti_zero: float = _option(1.0, "Weight of anti_zero, which no schedule changes.")
    regularizer_schedule: str = _option(
        "quadratic", "Curve by which lambda_query and lambda_document rise.", SCHEDULES
    )
    regularizer_steps: int = _option(
        0, "Number of steps until both weights are final; 0: they are final from the start."
    )
    flops_threshold_query: int | None = _option(
        None, "Number of active terms up to which flops ignores a query."
    )
    flops_threshold_document: int | None = _option(
        None, "Number of active terms up to which flops ignores a document."
    )
    df_alpha: float = _option(0.1, "Document frequency at which the weight in df_flops is 1/2.")
    df_beta: float = _option(10.0, "Steepness of the weight in df_flops.")
    df_momentum: float = _option(
        0.99,
        "Momentum of the running document frequencies of df_flops.",
    )
    query_top_k: int | None = _option(None, "Keep the k largest entries of a query's vector.")
    document_top_k: int | None = _option(None, "Keep the k largest entries of a document's vector.")
    cache_size: int = _option(0, "Number of documents in the caches of all ranks.")
    cache_embeddings: str = _option(
        "sparse", "Entries stored of a vector. sparse: the cache_k largest; dense: all.",
        CACHE_EMBEDDINGS,
    )  # fmt: skip
    cache_k: int = _option(256, "Number of entries stored of a vector in a sparse cache.")
    cache_dtype: str = _option("float32", "Type of the cached vectors.", CACHE_DTYPES)
    cache_top_k: int | None = _option(
        None, "Number of cached documents that each query is compared with; by default all."
    )
    cache_top_k_method: str = _option(
        "grouped",
        "grouped: the best document of each of cache_top_k parts of the cache; exact: the "
        "cache_top_k best documents.",
        TOP_K_METHODS,
    )
    cache_negatives: int = _option(1, "Number of negatives drawn for each query.")
    cache_in_batch: bool = _option(
        True,
        "Whether the rank's other positives are candidates. Hard negatives always are.",
    )
    cache_exclude: bool = _option(
        True,
        "Whether to exclude a query's own positive, and those of its copies, from its negatives.",
    )
    cache_document_length: int = _option(256, "Maximum number of tokens of a cached document.")
    cache_sharing: str = _option(
        "replicas",
        "Caches of several ranks. replicas: each rank has the same cache_size documents; "
        "shards: each rank has a part of one cache; own: each rank has a separate part.",
        SHARINGS,
    )
    cache_use_lru: bool = _option(
        True,
        "Whether a drawn document, whose vector is refreshed, counts as new when the oldest "
        "documents are replaced.",
    )
    cache_storage: str = _option(
        "device",
        "Memory of the cached documents: that of the device, or pinned host memory.",
        STORAGES,
    )
    mini_batch_size: int | None = _option(
        None,
        "Number of texts encoded at a time, and once more for the gradient; by default all texts.",
    )
    mini_batch_tokens: int | None = _option(
        None,
        "Number of tokens encoded at a time, with padding, and once more for the gradient; by "
        "default all. A longer text is encoded alone.",
    )

    def __post_init__(self) -> None:
        self.check_objective()

    def check_objective(self) -> None:
        """Raise if a field is out of range, or two contradict each other. Counts become ints."""
        check_choices(self, ObjectiveArguments)
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        for name in ("lambda_query", "lambda_document", "lambda_anti_zero", "hardness"):
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
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, check_count(name, value, minimum))
        for side in ("query", "document"):
            terms = regularizer_terms(f"{side}_regularizer", getattr(self, f"{side}_regularizer"))
            threshold = f"flops_threshold_{side}"
            if getattr(self, threshold) is not None and "flops" not in terms:
                raise ValueError(
                    f"{threshold} must be None without flops in {side}_regularizer, "
                    f"got {getattr(self, threshold)}"
                )
        losses = self.loss_terms()
        if self.hardness and "in_batch" not in losses:
            raise ValueError(
                f"hardness must be 0 without in_batch in the loss, got {self.hardness}"
            )
        if "negative_cache" in losses and self.cache_size < 1:
            raise ValueError(
                f"cache_size must be at least 1 for the loss negative_cache, got {self.cache_size}"
            )
        if "negative_cache" not in losses and self.cache_size:
            raise ValueError(
                f"cache_size must be 0 for the loss {self.loss}, which has no cache, "
                f"got {self.cache_size}"
            )

    def loss_terms(self) -> dict[str, float]:
        """Return the weight of each loss, {"kl": 1.0, "margin_mse": 0.05} of kl+0.05*margin_mse.

        Raises:
            TypeError: loss is not a str.
            ValueError: a loss is unknown, occurs twice or does not go with another one, or a weight
                is not a number above 0.
        """
        if not isinstance(self.loss, str):
            raise TypeError(f"loss must be a str, got {type(self.loss).__name__}")
        terms: dict[str, float] = {}
        for term in self.loss.split("+"):
            weight, star, name = term.rpartition("*")
            name = name.strip()
            if name not in LOSSES or name in terms:
                raise ValueError(
                    f"loss must be one of {', '.join(LOSSES)}, or several joined by +, each once, "
                    f"got {self.loss!r}"
                )
            terms[name] = _parse_weight(weight, self.loss) if star else 1.0
        if "pointwise" in terms and len(terms) > 1:
            raise ValueError(
                "loss must not join pointwise, whose pairs may be irrelevant, with others, "
                f"got {self.loss!r}"
            )
        if {"in_batch", "negative_cache"} <= terms.keys():
            raise ValueError(
                "loss must not join in_batch and negative_cache, which compares with the batch as "
                f"well, got {self.loss!r}"
            )
        return terms


def _parse_weight(text: str, loss: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"loss must have weights above 0, got {text.strip()!r} in {loss!r}")
    return weight


_NUMBERS = (
    *("lambda_query", "lambda_document", "lambda_anti_zero", "temperature", "hardness"),
    *("df_alpha", "df_beta", "df_momentum"),
)
_MINIMUM = {
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
    "mini_batch_tokens": 1,
}


def regularizer_terms(name: str, joined: str) -> tuple[str, ...]:
    """Return the terms of a regulariser such as "flops+anti_zero"; () for "none".

    Args:
        name: name of the argument, for error messages.
        joined: terms joined by +.

    Raises:
        TypeError: joined is not a str.
        ValueError: a term is unknown or occurs twice.
    """
    if not isinstance(joined, str):
        raise TypeError(f"{name} must be a str, got {type(joined).__name__}")
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
    """Raise ValueError if a field of the dataclass `kind` has a value outside its choices."""
    for option in fields(kind):
        choices, value = option.metadata.get("choices"), getattr(arguments, option.name)
        if value is None and option.default is None:
            continue
        if choices is not None and value not in choices:
            raise ValueError(f"{option.name} must be one of {', '.join(choices)}, got {value!r}")
