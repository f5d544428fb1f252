"""SpladeEncoder: a masked language model as an encoder of texts into sparse vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from splade_fast.checkpoints import (
    EncoderSettings,
    lower_case_inputs,
    read_settings,
    sparse_encoder_files,
)
from splade_fast.hidden_states import check_decoder_is_last, decoder_of, hidden_before_decoder
from splade_fast.ops.head import splade_head
from splade_fast.ops.head_topk import splade_head_topk
from splade_fast.sparse_rows import SparseRows

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class SpladeEncoder(nn.Module):
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
        super().__init__()
        check_decoder_is_last(model)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or EncoderSettings()

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> SpladeEncoder:
        """Load any transformers masked-LM or causal-LM checkpoint, or a SparseEncoder folder.

        Args:
            name_or_path: a hub name or a folder.
            kwargs: passed to transformers (`dtype`, `revision`, `attn_implementation`, …).

        Raises:
            OSError: nothing of that name was found.
            ValueError: the checkpoint needs code of its own, or is no plain SPLADE model.
        """
        if kwargs.get("trust_remote_code"):
            raise ValueError("trust_remote_code must be False, got True: remote code never runs")
        if not kwargs.get("weights_only", True):
            raise ValueError("weights_only must be True, got False: pickles are never executed")
        name = os.fspath(name_or_path)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        settings = read_settings(name, hub)
        hub["subfolder"] = kwargs["subfolder"] = settings.subfolder
        config = AutoConfig.from_pretrained(name, **hub)
        model = _auto_class(config).from_pretrained(name, config=config, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        if settings.lower_case:
            lower_case_inputs(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.eval(), tokenizer, settings).eval()

    @property
    def device(self) -> torch.device:
        """Where the model is and its inputs have to be."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of every vector."""
        return decoder_of(self.model).out_features

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Pooled vectors (B, V), differentiable in all parameters.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), nonzero counts; all count without it.
            kwargs: further inputs of the transformer, such as `token_type_ids`.
        """
        return splade_head(
            *self._head_inputs(input_ids, attention_mask, **kwargs),
            pooling=self.settings.pooling,
            activation=self.settings.activation,
        )

    def tokenize(self, texts: Sequence[str], max_length: int = 256) -> dict[str, Tensor]:
        """Inputs of `forward` on the model's device, padded to the longest text.

        Args:
            texts: at least one text.
            max_length: tokens kept of each text, special ones included; never more than the
                model's own limit.
        """
        encoding = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self._length_limit(max_length),
            padding=True,
            return_tensors="np",  # torch takes three times as long to read the lists
        )
        return {
            name: torch.from_numpy(array).to(self.device) for name, array in encoding.items()
        }

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        k: int | None = None,
        batch_size: int = 32,
        max_length: int = 256,
        show_progress: bool = True,
        prompt_name: str | None = None,
    ) -> SparseRows:
        """One sparse vector per text, in the order of the texts, in CPU memory.

        Args:
            texts: any number of texts; a single string counts as one text.
            k: keep at most the k largest entries of each vector.
            batch_size: texts of similar length that go through the model together.
            max_length: tokens kept of each text, special ones included; never more than the
                model's own limit.
            show_progress: draw a progress bar.
            prompt_name: which of `settings.prompts` goes before each text; by default the
                model's default prompt, which most models do not have.

        Returns:
            SparseRows of len(texts) rows; a single string gives one row.

        Raises:
            TypeError, ValueError: an argument is out of range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{position}] must be a str, got {type(text).__name__}")
        for name, number in (("batch_size", batch_size), ("max_length", max_length)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        prompt = self._prompt(prompt_name)
        # Texts of one length together: a batch costs as much as its longest text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        parts = [self._no_rows()]
        was_training = self.training
        self.eval()
        try:
            with tqdm(total=len(texts), unit="text", disable=not show_progress) as progress:
                for start in range(0, len(texts), batch_size):
                    batch = [prompt + texts[i] for i in order[start : start + batch_size]]
                    rows = splade_head_topk(
                        *self._head_inputs(**self.tokenize(batch, max_length)),
                        k=k,
                        pooling=self.settings.pooling,
                        activation=self.settings.activation,
                    )
                    parts.append(rows.to("cpu"))
                    progress.update(len(batch))
        finally:
            self.train(was_training)
        positions = torch.empty(len(texts), dtype=torch.int64)
        positions[order] = torch.arange(len(texts))
        return SparseRows.cat(parts)[positions]

    def top_terms(self, rows: SparseRows, count: int | None = None) -> list[dict[str, float]]:
        """{token: weight} of the `count` heaviest entries of each row, heaviest first."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        return [
            dict(sorted(weights.items(), key=lambda item: -item[1])[:count])
            for weights in rows.to_dicts(names)
        ]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for transformers, for sentence-transformers' SparseEncoder and for us.

        Raises:
            ValueError: sentence-transformers has no such activation; nothing is written.
        """
        settings_files = sparse_encoder_files(self.settings)
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for name, content in settings_files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _head_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Hidden states before the decoder, its weight and bias, and the mask."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = hidden_before_decoder(
            self.model, input_ids=input_ids, attention_mask=attention_mask, **kwargs
        )
        decoder = decoder_of(self.model)
        return hidden, decoder.weight, decoder.bias, attention_mask

    def _length_limit(self, max_length: int) -> int:
        # tokenizer.model_max_length is a huge number where the tokenizer knows no limit.
        limits = [max_length, self.tokenizer.model_max_length]
        if self.settings.max_length is not None:
            limits.append(self.settings.max_length)
        return min(limits)

    def _prompt(self, name: str | None) -> str:
        name = name if name is not None else self.settings.default_prompt_name
        if name is None:
            return ""
        if name not in self.settings.prompts:
            raise ValueError(
                f"prompt_name must be one of {sorted(self.settings.prompts)}, got {name!r}"
            )
        return self.settings.prompts[name]

    def _no_rows(self) -> SparseRows:
        dtype = decoder_of(self.model).weight.dtype
        return SparseRows.from_dense(torch.empty(0, self.vocab_size, dtype=dtype))


def _auto_class(config: PreTrainedConfig) -> Any:
    architectures = config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForMaskedLM if masked and not causal else AutoModelForCausalLM
