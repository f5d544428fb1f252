"""SpladeEncoder: a masked language model as an encoder of texts into sparse vectors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from splade_fast._atomic_files import whole_folder
from splade_fast.encoders.hidden_states import (
    check_decoder_is_last,
    decoder_of,
    has_cache,
    head_inputs,
)
from splade_fast.encoders.pretrained import (
    EncoderSettings,
    adapted_checkpoint,
    hub_arguments,
    load_config,
    load_model,
    load_tokenizer,
    lower_case_inputs,
    read_settings,
    sparse_encoder_files,
    write_json_files,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.head import splade_head
from splade_fast.ops.head.topk import splade_head_topk
from splade_fast.ops.sparse_rows import SparseRows


class SpladeEncoder(TextEncoder):
    """y[v] = max over tokens t of log(1 + relu(logits[t, v])), without ever holding the logits.

    SPLADE (Formal et al., SIGIR 2021) and SPLADE v2 (arXiv:2109.10086). Use `from_pretrained`.

    Args:
        model: a transformers model with a language-modelling head.
        tokenizer: its tokenizer.
        settings: pooling, activation, maximum length and prompts.

    Raises:
        ValueError: the model's logits are not those of its decoder alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings | None = None,
    ) -> None:
        super().__init__(tokenizer, settings)
        check_decoder_is_last(model)
        self.model = model
        self._has_cache = has_cache(model)
        self.train(model.training)  # encode restores the mode of both

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> SpladeEncoder:
        """Load any transformers masked-LM or causal-LM checkpoint, or a SparseEncoder folder.

        A folder of PEFT adapters brings its base model along.

        Args:
            name_or_path: a hub name or a folder.
            kwargs: passed to transformers (`dtype`, `revision`, `attn_implementation`, …).

        Raises:
            OSError: nothing of that name was found.
            ValueError: the checkpoint needs code of its own, pickles hold more than weights, or it
                is no plain SPLADE model.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        settings = read_settings(name, hub)
        hub["subfolder"] = kwargs["subfolder"] = settings.subfolder
        config = load_config(adapted_checkpoint(name, hub) or name, hub)
        model = load_model(_auto_class(config), name, config, kwargs)
        tokenizer = load_tokenizer(name, hub)
        if settings.lower_case:
            lower_case_inputs(tokenizer)
        return cls(model.eval(), tokenizer, settings).eval()

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of every vector."""
        return decoder_of(self.model).out_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors' values."""
        return decoder_of(self.model).weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pooling_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Pooled vectors (B, V), differentiable in all parameters.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), nonzero counts; all count without it.
            pooling_mask: (B, L), zero leaves a position out of the pooling which the transformer
                does attend to, such as a token of the prompt. Padding stays out without it.
            kwargs: further inputs of the transformer, such as `token_type_ids`.

        Raises:
            TypeError, ValueError: a mask is not (B, L), or no bool, int or float.
        """
        return splade_head(
            *self._head_inputs(input_ids, attention_mask, pooling_mask, **kwargs),
            pooling=self.settings.pooling,
            activation=self.settings.activation,
        )

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """The vectors of `tokenize`'s output, at most the k largest entries of each."""
        return splade_head_topk(
            *self._head_inputs(**inputs),
            k=k,
            pooling=self.settings.pooling,
            activation=self.settings.activation,
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for transformers, for sentence-transformers' SparseEncoder and for us.

        Of causal LMs for transformers and us: SparseEncoder has none. Of a model with PEFT adapters
        the adapters alone, beside the name of their base model. The folder is written whole or not
        at all; see `splade_fast._atomic_files`.

        Raises:
            ValueError: sentence-transformers has no such activation; nothing is written.
        """
        settings_files = sparse_encoder_files(self.settings)
        with whole_folder(path) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_json_files(folder, settings_files)

    def _head_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Hidden states before the decoder, its weight and bias, and the mask of the pooling."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self._has_cache:  # of keys and values, for generating text
            kwargs.setdefault("use_cache", False)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return head_inputs(self.model, inputs, pooling_mask)


def _auto_class(config: PreTrainedConfig) -> Any:
    architectures = config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForMaskedLM if masked and not causal else AutoModelForCausalLM
