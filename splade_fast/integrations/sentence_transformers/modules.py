"""Transformer that stops before its decoder, and SpladePooling that includes the decoder."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from splade_fast.encoders.hidden_states import find_decoder, run_to_decoder
from splade_fast.encoders.settings import SPLADE_POOLING_ACTIVATIONS
from splade_fast.encoders.small_work import in_this_thread, multiplications_per_token
from splade_fast.integrations.sentence_transformers.swapping import Role
from splade_fast.ops.head import splade_head
from splade_fast.ops.head.topk import splade_head_topk

# Keys of the features. The transformer passes the decoder's weight and bias to the pooling. The
# encoder requests SparseRows of at most this number of entries from the pooling.
_DECODER = "splade_fast_decoder"
SPARSE = "splade_fast_sparse"

Features = dict[str, Any]


class HiddenTransformer(Role):
    """Transformer that passes the decoder's input and the decoder itself to the pooling."""

    model: Any
    modality_config: dict[str, Any]
    module_output_name: str

    def forward(self, features: Features, **kwargs: Any) -> Features:
        request = {SPARSE: features.pop(SPARSE)} if SPARSE in features else {}
        if self._should_run_original():
            features = self._original.forward(self, features, **kwargs)
        else:
            decoder, original = find_decoder(self.model), self._original.forward
            with self._in_this_thread_if_small(features, len(decoder.weight)):
                hidden = run_to_decoder(self.model, original, self, features, **kwargs)
            features[self.module_output_name] = hidden
            features[_DECODER] = (decoder.weight, decoder.bias)
        features.update(request)
        return features

    def _in_this_thread_if_small(
        self, features: Features, vocab_size: int
    ) -> AbstractContextManager[None]:
        if "input_ids" not in features or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        per_token = multiplications_per_token(self.model, vocab_size)
        return in_this_thread(features["input_ids"].numel() * per_token)

    def _should_run_original(self) -> bool:
        """Return whether states of all layers or virtual tokens need the original `forward`."""
        adapter = getattr(self.model, "active_peft_config", None)
        return bool(
            getattr(self.model.config, "output_hidden_states", False)
            or getattr(adapter, "is_prompt_learning", False)
        )


class HeadPooling(Role):
    """SpladePooling that computes no logits after a HiddenTransformer.

    Logits of any other module are pooled as by the original.
    """

    pooling_strategy: str
    activation_function: str
    embedding_dimension: int | None

    def forward(self, features: Features) -> Features:
        should_return_rows, k = SPARSE in features, features.pop(SPARSE, None)
        if _DECODER not in features:
            pooled_by_original: Features = self._original.forward(self, features)
            return pooled_by_original
        weight, bias = features.pop(_DECODER)
        hidden: Tensor = features["token_embeddings"]
        mask, cu_seqlens = features.get("attention_mask"), None
        if "cu_seq_lens_q" in features:  # flattened texts, (1, T, D)
            hidden, mask, cu_seqlens = hidden.squeeze(0), None, features["cu_seq_lens_q"].int()
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "pooling": self.pooling_strategy,
            "activation": SPLADE_POOLING_ACTIVATIONS[self.activation_function],
        }
        if self.embedding_dimension is None:
            self.embedding_dimension = weight.shape[0]
        # The width of SparseRows depends on the data, which torch.compile does not support.
        if should_return_rows and not torch.compiler.is_compiling():
            pooled: Any = splade_head_topk(hidden, weight, bias, mask, k=k, **options)
        else:
            pooled = splade_head(hidden, weight, bias, mask, **options)
        features["sentence_embedding"] = pooled
        return features
