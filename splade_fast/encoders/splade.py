"""SpladeEncoder: a language model that encodes texts into sparse vectors over its vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from splade_fast.encoders.adapters import (
    check_saves_adapters,
    find_base_model,
    load_adapters,
    make_base_absolute,
)
from splade_fast.encoders.attention import set_attention
from splade_fast.encoders.hidden_states import (
    check_decoder_is_last,
    find_decoder,
    find_position_limit,
    has_key_value_cache,
    head_inputs,
    run_to_decoder,
    takes_no_mask,
)
from splade_fast.encoders.inductor import vector_options
from splade_fast.encoders.pretrained import (
    hub_arguments,
    load_model,
    load_tokenizer,
    lower_case_inputs,
    refuse_subfolder,
    write_json_files,
)
from splade_fast.encoders.settings import EncoderSettings, read_settings, sparse_encoder_files
from splade_fast.encoders.small_work import in_this_thread, multiplications_per_token
from splade_fast.encoders.term_weights import has_term_weights
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.encoders.whole_weights import save_whole
from splade_fast.ops.head import splade_head
from splade_fast.ops.head.topk import splade_head_topk
from splade_fast.ops.sparse_rows import SparseRows


class SpladeEncoder(TextEncoder):
    """Encode texts as y[v] = max over tokens t of log(1 + relu(s · logits[t, v])).

    The logits are never held in memory, and s is 1 unless set. The models are SPLADE (Formal et
    al., SIGIR 2021) and SPLADE v2 (arXiv:2109.10086). `from_pretrained` loads one.

    Args:
        model: a transformers model with a language-modelling head, wrapped by PEFT or not.
        tokenizer: the model's tokenizer.
        settings: pooling, activation, attention, scale of logits, maximum length and prompts.

    Raises:
        ValueError: the model's logits are not `hidden · weightᵀ + bias` of its output embeddings,
            or it cannot attend as the settings say.

    Example::

        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> rows = encoder.encode(["quick fox", "lazy dog"], k=8, show_progress=False)
        >>> rows.to_dense().shape == (2, encoder.vocab_size)
        True
    """

    _run: Callable[..., Tensor] = staticmethod(run_to_decoder)  # or compiled, see `compile`

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings | None = None,
    ) -> None:
        super().__init__(tokenizer, settings)
        check_decoder_is_last(model)
        if self.settings.attention is not None:
            set_attention(model, self.settings.attention)
        self.model = model
        self.register_parameter("logit_scale", _make_logit_scale(model, self.settings))
        self.logit_scale: nn.Parameter | None
        self._has_key_value_cache = has_key_value_cache(model)
        # Found once: each tokenization reads it, and the search walks the modules.
        self._position_limit = find_position_limit(model)
        self._takes_no_mask = takes_no_mask(model)
        self._multiplications = multiplications_per_token(model, self.vocab_size)
        self.train(model.training)  # `encode` restores the mode of the encoder and of the model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        task: str = "document",
        attention: str | None = None,
        pooling: str | None = None,
        logit_scale: float | None = None,
        train_logit_scale: bool | None = None,
        echo: str | None = None,
        prompts: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> SpladeEncoder:
        """Load a masked-LM or causal-LM checkpoint, or a SparseEncoder folder.

        For a folder of PEFT adapters, the base model is loaded as well.

        Args:
            name_or_path: a hub name or a folder.
            task: "document" or "query", which selects the route of a folder with a Router; see
                also `BagOfWordsQueryEncoder.from_pretrained` and `load_query_encoder`.
            attention: "bidirectional" lets every token of a causal language model attend to all
                tokens, as in LLM2Vec (arXiv:2404.05961); "causal" to itself and earlier ones.
            pooling: "max", "sum", "mean" or "last".
            logit_scale: factor s of the logits; 1/16 keeps models with large logits, such as
                ModernBERT, from collapsing in training (arXiv:2606.18811).
            train_logit_scale: make the factor a parameter.
            echo: text between two copies of each text, of which the second is pooled
                (arXiv:2402.15449).
            prompts: texts before each encoded text by name, beside those of the folder; the trainer
                and the command line use the names "query" and "document".
            kwargs: arguments of transformers' `from_pretrained`, such as `dtype` or `revision`.

        A saved folder keeps these settings, from attention to prompts; None takes the folder's.

        Raises:
            ImportError: the checkpoint holds adapters, and peft is missing or does not work with
                the installed transformers.
            OSError: no checkpoint of that name was found, or it holds no tokenizer.
            ValueError: kwargs hold a subfolder, the checkpoint needs its own code, a pickle holds
                more than weights, a file is damaged, weights are missing (such as those of the
                language-modelling head), the folder describes another kind of model, a setting is
                out of range, or the model cannot attend so.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        refuse_subfolder(kwargs)
        settings = read_settings(name, hub, task)
        given: dict[str, Any] = {
            "attention": attention,
            "pooling": pooling,
            "logit_scale": logit_scale,
            "train_logit_scale": train_logit_scale,
            "echo": echo,
            "prompts": None if prompts is None else settings.prompts | prompts,
        }
        settings = replace(settings, **{n: v for n, v in given.items() if v is not None})
        hub["subfolder"] = settings.subfolder
        if has_term_weights(name, hub):
            raise ValueError(
                f"{name} must hold a language model, got weights of terms; TermWeightEncoder loads "
                "them"
            )
        base = find_base_model(name, hub)
        config = base.load_config()
        model = load_model(
            _auto_class(config),
            base.name_or_path,
            config,
            kwargs | base.load_arguments(),
            base.loaded_later,
        )
        # Older versions of transformers load adapters that lie beside the model all the same.
        if base.has_adapters and not getattr(model, "_hf_peft_config_loaded", False):
            model = load_adapters(model, name, hub)
        tokenizer = load_tokenizer(name, hub)
        if settings.lower_case:
            lower_case_inputs(tokenizer)
        return cls(model.eval(), tokenizer, settings).eval()

    @property
    def vocab_size(self) -> int:
        """Number of columns of every vector, V."""
        return find_decoder(self.model).out_features

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors' values."""
        return find_decoder(self.model).weight.dtype

    @property
    def position_limit(self) -> int | None:
        """Largest number of tokens that the model takes; None if it takes any number."""
        return self._position_limit

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pooling_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return pooled vectors (B, V), differentiable in all parameters.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), zero at padding; by default nothing is padding.
            pooling_mask: (B, L), zero at positions that the transformer attends to but the pooling
                leaves out, such as tokens of a prompt. Padding is left out in any case.
            kwargs: further inputs of the transformer, such as `token_type_ids`.

        Raises:
            TypeError: a mask is not a tensor of bool, int or float.
            ValueError: a mask is not (B, L).
        """
        return splade_head(
            *self._head_inputs(input_ids, attention_mask, pooling_mask, **kwargs),
            **self._head_options(),
        )

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """Return the vectors of `tokenize`'s output, with at most the k largest entries of each."""
        with in_this_thread(inputs["input_ids"].numel() * self._multiplications):
            arguments = self._head_inputs(**self._without_needless_mask(inputs), run=self._run)
        return splade_head_topk(*arguments, k=k, **self._head_options())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile calls of the encoder, and the transformer within `encode`, by torch.compile.

        Short texts gain most: the transformer of a query takes about half the time. Vectors change
        by rounding alone. Each kind of input is compiled at its first use, which takes seconds: a
        single text, several texts, and texts with padding. Copies of the encoder and encoders in
        other processes are not compiled.

        Args:
            args, kwargs: those of `torch.compile`; with dynamic=True, one graph serves all lengths.

        Example::

            >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
            >>> encoder.compile(dynamic=True, backend="eager")  # no compiler of C++ is needed
            >>> len(encoder.encode("quick fox", show_progress=False))
            1
        """
        own: dict[str, Any] = kwargs.pop("options", None) or {}
        is_inductor = kwargs.get("backend", "inductor") == "inductor" and kwargs.get("mode") is None
        options = vector_options() | own if is_inductor else own
        # Each call gets its own dictionary, since torch takes some options out of it.
        super().compile(*args, **kwargs, options=dict(options) or None)
        if is_inductor:
            # Kernels that ask for the number of threads in each call run short texts in one.
            options = {"cpp.dynamic_threads": True} | options
        self._run = torch.compile(run_to_decoder, *args, **kwargs, options=dict(options) or None)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # without what torch compiled
        state.pop("_run", None)
        return state

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that transformers, sentence-transformers and `from_pretrained` load.

        sentence-transformers' SparseEncoder refuses causal LMs, the poolings "mean" and "last", a
        scale of logits and an echo, which its modules lack. For a model with PEFT
        adapters, only the adapters and the name of the base model are written. The folder appears
        complete or not at all. Of an encoder that FSDP2 has sharded, all ranks call it and the
        first one writes.

        Args:
            path: the folder; existing files of the same names are replaced.

        Raises:
            ImportError: transformers added the adapters and refuses the installed peft; nothing is
                written.
            ValueError: sentence-transformers has no such activation; nothing is written.
        """
        check_saves_adapters(self.model)
        sparse_encoder_files(self.settings)  # raises before anything is written
        save_whole(self, path, self._write_files)

    def _write_files(self, folder: Path) -> None:
        """Write model, tokenizer and settings."""
        self.model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
        make_base_absolute(folder)
        self.tokenizer.save_pretrained(folder)
        settings = self.settings
        if self.logit_scale is not None:
            settings = replace(settings, logit_scale=float(self.logit_scale.detach()))
        write_json_files(folder, sparse_encoder_files(settings))

    def _head_options(self) -> dict[str, Any]:
        scale = self.settings.logit_scale if self.logit_scale is None else self.logit_scale
        return {
            "pooling": self.settings.pooling,
            "activation": self.settings.activation,
            "logit_scale": scale,
        }

    def _without_needless_mask(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the mask of a single whole text: transformers spends a while on masks."""
        mask = inputs.get("attention_mask")
        if mask is None or len(mask) > 1 or mask.is_cuda or not self._takes_no_mask:
            return inputs
        if not mask.all():
            return inputs
        return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}

    def _head_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        run: Callable[..., Tensor] = run_to_decoder,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if attention_mask is None and not self._takes_no_mask:
            attention_mask = torch.ones_like(input_ids)
        if self._has_key_value_cache:  # needed to generate text only
            kwargs.setdefault("use_cache", False)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return head_inputs(self.model, inputs, pooling_mask, run=run)


def _make_logit_scale(model: PreTrainedModel, settings: EncoderSettings) -> nn.Parameter | None:
    """Return the scale as a parameter like the decoder's weight; None for a fixed one.

    It has one dimension, since FSDP shards no parameter without one.
    """
    if not settings.train_logit_scale:
        return None
    weight = find_decoder(model).weight
    return nn.Parameter(weight.new_full((1,), settings.logit_scale, requires_grad=False))


def _auto_class(config: PreTrainedConfig) -> Any:
    architectures = config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForMaskedLM if masked and not causal else AutoModelForCausalLM
