"""Negative cache of the training objective, with the features that the cache stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splade_fast._distributed import mean_over_ranks, world_size
from splade_fast.encoders.batching import without_padding
from splade_fast.encoders.echo import POOLING_MASK
from splade_fast.encoders.text_ids import WORDS, text_ids
from splade_fast.negative_cache.features import Feature, FixedLenFeature, SparseFeature, Value
from splade_fast.negative_cache.handlers import CacheLossHandler
from splade_fast.negative_cache.losses import (
    CacheClassificationLoss,
    CacheLossReturn,
    DistributedCacheClassificationLoss,
)
from splade_fast.negative_cache.negative_cache import CacheManager
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn
from splade_fast.negative_cache.transforms import Scale
from splade_fast.training.objective_arguments import ObjectiveArguments

Network = Callable[[dict[str, Tensor]], Tensor]

_EMBEDDING = "embedding"
_QUERY = "query"  # ids of the tokens of the query whose positive a document is
_IDS, _MASK = "input_ids", "attention_mask"
_DTYPES = {
    _MASK: torch.bool,
    POOLING_MASK: torch.bool,
    "token_type_ids": torch.int16,
}  # other inputs are int32


class DocumentCacheHandler(CacheLossHandler):
    """A cache of tokenized documents and their vectors, and the loss over it.

    Args:
        arguments: options of the objective.
        tokenizer: tokenizer of the documents, whose inputs the cache stores.
        vocab_size: V.
        seed: seed of the draws. With shards, the seed of the first rank is used.
        has_pooling_mask: whether the inputs have a pooling_mask beside those of the tokenizer.

    Raises:
        ValueError: the cache has fewer slots than there are ranks to share them.
    """

    def __init__(
        self,
        arguments: ObjectiveArguments,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        seed: int,
        has_pooling_mask: bool = False,
    ) -> None:
        paddings = _paddings(tokenizer) | ({POOLING_MASK: 0} if has_pooling_mask else {})
        specs = _specs(arguments, paddings, vocab_size)
        ranks = world_size()
        has_shards = ranks > 1 and arguments.cache_sharing == "shards"
        loss_class = DistributedCacheClassificationLoss if has_shards else CacheClassificationLoss
        loss = loss_class(
            _EMBEDDING,
            tuple(paddings),
            score_transform=Scale(1 / arguments.temperature),
            top_k=arguments.cache_top_k,
            top_k_method=arguments.cache_top_k_method,
            num_negatives=arguments.cache_negatives,
            in_batch=arguments.cache_in_batch,
            exclude=_IDS if arguments.cache_exclude else None,
            exclude_any=_QUERY if arguments.cache_exclude else None,
            retrieval_fn=GumbelMaxRetrievalFn(seed=seed),
            reducer=None,
        )
        super().__init__(
            CacheManager(
                specs,
                _count_slots(arguments),
                arguments.cache_use_lru,
                storage=arguments.cache_storage,
            ),
            loss,
            _EMBEDDING,
            tuple(paddings),
            use_cross_replica=ranks > 1 and arguments.cache_sharing == "replicas",
        )
        self._is_left_padded = tokenizer.padding_side == "left"
        self._max_tokens = arguments.cache_document_length

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError if the cache cannot store these tokenized documents."""
        if set(inputs) != set(self.data_keys):
            raise ValueError(
                f"documents must have {sorted(self.data_keys)}, the tokenizer's inputs, which the "
                f"cache stores, got {sorted(inputs)}"
            )
        width = inputs[_IDS].shape[1]
        if width > self._max_tokens:
            raise ValueError(
                f"documents must be at most cache_document_length = {self._max_tokens} tokens "
                f"long, got {width}"
            )

    def step_batch(
        self,
        network: Network,
        queries: Tensor,
        documents: Tensor,
        inputs: Mapping[str, Tensor],
        query_inputs: Mapping[str, Tensor] | None = None,
    ) -> CacheLossReturn:
        """Compute the loss of a batch over the cache, then update the cache with its positives.

        Args:
            network: function from tokenized texts without padding to vectors.
            queries: vectors of the queries, (B, V).
            documents: vectors of the documents, (m * B, V): the positive of each query, then hard
                negatives. Hard negatives are candidates of every query and are not cached.
            inputs: tokenized documents, (m * B, L) by name, see `check_inputs`.
            query_inputs: tokenized queries, (B, L) by name, by which the positives of a query's
                copies are found; None: all queries differ.

        Returns:
            The results of the loss. Its three losses are means over all ranks.
        """

        def encode(stored: dict[str, Value]) -> Tensor:
            texts = {
                name: tensor.to(inputs[name].dtype)
                for name, tensor in stored.items()
                if isinstance(tensor, Tensor)
            }
            return network(without_padding(texts)).to(documents.dtype)

        features = _align_left(inputs) if self._is_left_padded else inputs
        batch = len(queries)
        has_hard = len(documents) > batch
        positives = {name: tensor[:batch] for name, tensor in features.items()}
        # Queries of unknown tokens are told apart by their documents.
        query_ids = text_ids(positives if query_inputs is None else query_inputs)
        no_query = query_ids.new_zeros(len(documents) - batch, WORDS)
        result = self.step(
            encode,
            queries,
            documents[:batch],
            positives | {_QUERY: query_ids},
            hard_negatives=documents[batch:] if has_hard else None,
            hard_features={name: tensor[batch:] for name, tensor in features.items()}
            | {_QUERY: no_query},
        )
        # The means are taken after the step, because a rank whose network fails never gets here.
        return result._replace(
            training_loss=mean_over_ranks(result.training_loss),
            interpretable_loss=mean_over_ranks(result.interpretable_loss),
            staleness=mean_over_ranks(result.staleness),
        )


def _paddings(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the padding value of each input of the tokenizer, by name."""
    known = {_IDS: tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: known.get(name, 0) for name in tokenizer.model_input_names}


def _specs(
    arguments: ObjectiveArguments, paddings: Mapping[str, int], vocab_size: int
) -> dict[str, Feature]:
    length = arguments.cache_document_length
    # All documents are padded to one length, so that a document is stored alike from any batch.
    specs: dict[str, Feature] = {
        name: FixedLenFeature([length], _DTYPES.get(name, torch.int32), default_value=padding)
        for name, padding in paddings.items()
    }
    if arguments.cache_exclude:
        specs[_QUERY] = FixedLenFeature([WORDS], torch.int64)
    dtype: torch.dtype = getattr(torch, arguments.cache_dtype)
    if arguments.cache_embeddings == "sparse":
        k = min(arguments.cache_k, vocab_size)
        specs[_EMBEDDING] = SparseFeature(vocab_size, k, dtype)
    else:
        specs[_EMBEDDING] = FixedLenFeature([vocab_size], dtype)
    return specs


def _count_slots(arguments: ObjectiveArguments) -> int:
    """Return the number of slots of this rank."""
    ranks = world_size()
    if ranks == 1 or arguments.cache_sharing == "replicas":
        return arguments.cache_size
    if arguments.cache_size < ranks:
        raise ValueError(
            f"cache_size must be at least the number of ranks, {ranks}, got {arguments.cache_size}"
        )
    share, more = divmod(arguments.cache_size, ranks)
    return share + (dist.get_rank() < more)


def _align_left(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move padding behind the texts, so that a document is stored alike from any batch."""
    order = (inputs[_MASK] == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return {name: tensor.gather(1, order) for name, tensor in inputs.items()}
