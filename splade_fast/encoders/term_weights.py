"""TermWeightEncoder: an encoder that weighs the terms of a text and adds none."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from splade_fast._checks import check_mask
from splade_fast.encoders.hidden_states import find_position_limit, has_key_value_cache
from splade_fast.encoders.pretrained import (
    find_file,
    hub_arguments,
    load_config,
    load_model,
    load_tokenizer,
    read_json_object,
    refuse_subfolder,
    write_json_files,
)
from splade_fast.encoders.settings import (
    EncoderSettings,
    find_transformer,
    refuse_splade_options,
)
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.encoders.weights import read_weights
from splade_fast.encoders.whole_weights import save_whole
from splade_fast.ops.sparse_rows import SparseRows

_WEIGHTS_FILE = "term_weights.safetensors"
_SETTINGS_FILE = "term_weights.json"
_BGE_M3_FILE = "sparse_linear.pt"  # state of the projection


class TermWeightEncoder(TextEncoder):
    """Encode texts as y[v] = max over positions t with token v of log(1 + relu(w · hidden[t] + b)).

    Entries of tokens that the text does not contain, and of special tokens, are 0. The model is
    uniCOIL (Lin and Ma, arXiv:2106.14807) or, with the activation "relu", the lexical weights of
    BGE-M3 (arXiv:2402.03216). `from_pretrained` loads one.

    Args:
        model: a transformers encoder without a head.
        tokenizer: the model's tokenizer.
        settings: activation ("log1p_relu" or "relu"), maximum length and prompts.
        projection: a Linear (D -> 1); by default a new one, which gives all terms similar weights.

    Raises:
        ValueError: an argument does not fit the model, or a setting is not supported.

    Example::

        >>> encoder = sf.TermWeightEncoder.from_pretrained("CHECKPOINT")
        >>> [terms] = encoder.top_terms(encoder.encode("quick fox", show_progress=False))
        >>> sorted(terms)
        ['fox', 'quick']
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
        refuse_splade_options("settings.", dataclasses.asdict(self.settings))
        if projection is None:
            projection = _new_projection(model)
        if tuple(projection.weight.shape) != (1, config.hidden_size):
            raise ValueError(
                f"projection must be a Linear of {config.hidden_size} inputs, the model's "
                f"hidden_size, and 1 output, got weight {tuple(projection.weight.shape)}"
            )
        self.model = model
        self.projection = projection
        self._has_key_value_cache = has_key_value_cache(model)
        # Found once: each tokenization reads it, and the search walks the modules.
        self._position_limit = find_position_limit(model)
        self.train(model.training)  # `encode` restores the mode of the encoder and of the model
        special_ids = [i for i in tokenizer.all_special_ids if i < self.vocab_size]
        term_mask = torch.ones(self.vocab_size, dtype=torch.bool)  # False for special tokens
        term_mask[special_ids] = False
        self.register_buffer("term_mask", term_mask.to(model.device), persistent=False)
        self.term_mask: Tensor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> TermWeightEncoder:
        """Load a saved TermWeightEncoder or BGE-M3, or add a new projection to any other encoder.

        Args:
            name_or_path: a hub name or a folder.
            kwargs: arguments of transformers' `from_pretrained`, such as `dtype` or `revision`.

        Raises:
            OSError: no checkpoint of that name was found, or it holds no tokenizer.
            ValueError: kwargs hold a subfolder, the checkpoint needs its own code, a pickle holds
                more than weights, a file is damaged, weights are missing, or the files do not fit
                together.
        """
        name = os.fspath(name_or_path)
        hub = hub_arguments(kwargs)
        refuse_subfolder(kwargs)
        refuse_splade_options("", kwargs)
        try:
            settings = EncoderSettings(**read_json_object(name, _SETTINGS_FILE, hub))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_SETTINGS_FILE} of {name} must hold settings: {error}") from error
        weights = find_file(name, _WEIGHTS_FILE, hub)
        if weights is None and (weights := find_file(name, _BGE_M3_FILE, hub)) is not None:
            settings.activation = "relu"
        hub["subfolder"] = settings.subfolder or find_transformer(name, hub)
        config = load_config(name, hub)
        # Parameters of a pooling layer would never get a gradient.
        model_class = MODEL_MAPPING.get(type(config), None)  # a tuple for a few configurations
        if (
            isinstance(model_class, type)
            and "add_pooling_layer" in inspect.signature(model_class).parameters
        ):
            kwargs["add_pooling_layer"] = False
        model = load_model(AutoModel, name, config, kwargs | hub)
        encoder = cls(model, load_tokenizer(name, hub), settings)
        if weights is not None:
            _load_projection(encoder.projection, weights)
        return encoder.eval()

    @property
    def vocab_size(self) -> int:
        """Number of columns of every vector, V."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.num_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors' values."""
        return self.projection.weight.dtype

    @property
    def position_limit(self) -> int | None:
        """Largest number of tokens that the model takes; None if it takes any number."""
        return self._position_limit

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return vectors (B, V), differentiable in all parameters.

        Positions of one token with equal weights share the gradient evenly, as in torch.amax.
        Under autocast the result is float32.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), zero at padding; by default nothing is padding.
            kwargs: further inputs of the transformer, such as `token_type_ids`.

        Raises:
            TypeError: the mask is not a tensor of bool, int or float.
            ValueError: the mask is not (B, L).
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch, length = input_ids.shape
        mask = check_mask(attention_mask, batch, length, "input_ids", input_ids)
        if self._has_key_value_cache:  # needed to generate text only
            kwargs.setdefault("use_cache", False)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.projection(outputs.last_hidden_state).squeeze(-1)
        if torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
            logits = logits.float()
        weights = torch.relu(logits)
        if self.settings.activation == "log1p_relu":
            weights = torch.log1p(weights)
        weights = torch.where(mask & self.term_mask[input_ids], weights, 0)
        vectors = weights.new_zeros(batch, self.vocab_size)
        return vectors.scatter_reduce(1, input_ids, weights, "amax")

    def sparse_rows(self, inputs: dict[str, Tensor], k: int | None) -> SparseRows:
        """Return the vectors of `tokenize`'s output, with at most the k largest entries of each."""
        return SparseRows.from_dense(self(**inputs), k)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder for `from_pretrained`; transformers loads the encoder from it as well.

        The folder appears complete or not at all. Of an encoder that FSDP2 has sharded, all ranks
        call it and the first one writes.

        Args:
            path: the folder; existing files of the same names are replaced.
        """
        save_whole(self, path, self._write_files)

    def _write_files(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.projection.state_dict(), folder / _WEIGHTS_FILE, {"format": "pt"})
        write_json_files(folder, {_SETTINGS_FILE: dataclasses.asdict(self.settings)})


def has_term_weights(name_or_path: str, hub: dict[str, Any]) -> bool:
    """Return whether a folder or hub name holds the projection of a TermWeightEncoder."""
    files = (_WEIGHTS_FILE, _BGE_M3_FILE)
    return any(find_file(name_or_path, file, hub) is not None for file in files)


def _load_projection(projection: nn.Linear, path: str) -> None:
    try:
        projection.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} must hold weight {tuple(projection.weight.shape)} and bias (1,): {error}"
        ) from error


def _new_projection(model: PreTrainedModel) -> nn.Linear:
    """Return a new projection with outputs near 1: terms of negative outputs get no gradient."""
    projection = nn.Linear(model.config.hidden_size, 1, device=model.device, dtype=model.dtype)
    nn.init.normal_(projection.weight, std=0.02)
    nn.init.ones_(projection.bias)
    return projection
