"""TermWeightEncoder: an encoder that weighs the terms that a text itself contains."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from splade_fast._atomic_files import whole_folder
from splade_fast._checks import check_mask
from splade_fast.encoders.hidden_states import has_cache
from splade_fast.encoders.pretrained import (
    EncoderSettings,
    find_file,
    hub_arguments,
    load_config,
    load_model,
    load_tokenizer,
    read_json,
    weights_only,
    write_json_files,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.ops.sparse_rows import SparseRows

_WEIGHTS_FILE = "term_weights.safetensors"
_SETTINGS_FILE = "term_weights.json"
_BGE_M3_FILE = "sparse_linear.pt"  # beside the encoder: the projection's state


class TermWeightEncoder(TextEncoder):
    """y[v] = max over positions t with token v of log(1 + relu(w · hidden[t] + b)), else 0.

    uniCOIL (Lin and Ma, arXiv:2106.14807); with the activation "relu" the lexical weights of BGE-M3
    (arXiv:2402.03216). Special tokens never weigh. Use `from_pretrained`.

    Args:
        model: a transformers encoder without a head.
        tokenizer: its tokenizer.
        settings: activation ("log1p_relu" or "relu"), maximum length and prompts.
        projection: a Linear (D -> 1); by default a new one that weighs all alike.

    Raises:
        ValueError: an argument does not fit the model, or a setting has no meaning here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings | None = None,
        projection: nn.Linear | None = None,
    ) -> None:
        super().__init__(tokenizer, settings)
        config = model.config
        if config.is_encoder_decoder:
            raise ValueError(f"model must be an encoder, got {type(model).__name__} with a decoder")
        if self.settings.activation not in ("relu", "log1p_relu"):
            raise ValueError(
                "settings.activation must be 'log1p_relu' or 'relu', "
                f"got {self.settings.activation!r}"
            )
        if self.settings.pooling != "max":
            raise ValueError(f"settings.pooling must be 'max', got {self.settings.pooling!r}")
        if projection is None:
            projection = _new_projection(model)
        if tuple(projection.weight.shape) != (1, config.hidden_size):
            raise ValueError(
                f"projection must be a Linear of {config.hidden_size} inputs, the model's "
                f"hidden_size, and 1 output, got weight {tuple(projection.weight.shape)}"
            )
        self.model = model
        self.projection = projection
        self._has_cache = has_cache(model)
        self.train(model.training)  # encode restores the mode of both
        special = [i for i in tokenizer.all_special_ids if i < self.vocab_size]
        weighs = torch.ones(self.vocab_size, dtype=torch.bool)
        weighs[special] = False
        self.register_buffer("weighs", weighs.to(model.device), persistent=False)
        self.weighs: Tensor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> TermWeightEncoder:
        """Load a saved TermWeightEncoder, BGE-M3, or any encoder with a new projection.

        Args:
            name_or_path: a hub name or a folder.
            kwargs: passed to transformers (`dtype`, `revision`, `attn_implementation`, …).

        Raises:
            OSError: nothing of that name was found.
            ValueError: the checkpoint needs code of its own, pickles hold more than weights, or
                its files do not fit together.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        try:
            settings = EncoderSettings(**(read_json(name, _SETTINGS_FILE, hub) or {}))
        except TypeError as error:
            raise ValueError(f"{_SETTINGS_FILE} of {name} must hold settings: {error}") from error
        state = None
        if (weights := find_file(name, _WEIGHTS_FILE, hub)) is not None:
            state = load_file(weights)
        elif (weights := find_file(name, _BGE_M3_FILE, hub)) is not None:
            with weights_only(name):
                state = torch.load(weights, map_location="cpu", weights_only=True)
            settings.activation = "relu"
        config = load_config(name, hub)
        # A pooler would be a parameter that never gets a gradient.
        model_class = MODEL_MAPPING.get(type(config), None)
        if isinstance(model_class, type) and (  # a few configurations have several
            "add_pooling_layer" in inspect.signature(model_class).parameters
        ):
            kwargs["add_pooling_layer"] = False
        model = load_model(AutoModel, name, config, kwargs)
        tokenizer = load_tokenizer(name, hub)
        encoder = cls(model, tokenizer, settings)
        if state is not None:
            encoder.projection.load_state_dict(state)
        return encoder.eval()

    @property
    def vocab_size(self) -> int:
        """V, the number of columns of every vector."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.num_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors' values."""
        return self.projection.weight.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Vectors (B, V), differentiable in all parameters.

        Equal weights of one term share its gradient evenly, as in torch.amax. Under autocast the
        result is float32.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), nonzero counts; all count without it.
            kwargs: further inputs of the transformer, such as `token_type_ids`.

        Raises:
            TypeError, ValueError: the mask is not (B, L), or no bool, int or float.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch, length = input_ids.shape
        counts = check_mask(attention_mask, batch, length, "input_ids", input_ids)
        if self._has_cache:  # of keys and values, for generating text
            kwargs.setdefault("use_cache", False)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.projection(outputs.last_hidden_state).squeeze(-1)
        if torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
            logits = logits.float()
        weights = torch.relu(logits)
        if self.settings.activation == "log1p_relu":
            weights = torch.log1p(weights)
        weights = torch.where(counts & self.weighs[input_ids], weights, 0)
        vectors = weights.new_zeros(batch, self.vocab_size)
        return vectors.scatter_reduce(1, input_ids, weights, "amax")

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """The vectors of `tokenize`'s output, at most the k largest entries of each."""
        return SparseRows.from_dense(self(**inputs), k)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for `from_pretrained`, whose encoder plain transformers loads as well.

        It is written whole or not at all; see `splade_fast._atomic_files`.
        """
        with whole_folder(path) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save_file(self.projection.state_dict(), folder / _WEIGHTS_FILE, {"format": "pt"})
            write_json_files(folder, {_SETTINGS_FILE: dataclasses.asdict(self.settings)})


def _new_projection(model: PreTrainedModel) -> nn.Linear:
    """Every term weighs about log(2): where all weights start negative, none gets a gradient."""
    projection = nn.Linear(model.config.hidden_size, 1, device=model.device, dtype=model.dtype)
    nn.init.normal_(projection.weight, std=0.02)
    nn.init.ones_(projection.bias)
    return projection
