"""EncoderSettings, and the JSON files in which sentence-transformers keeps them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from splade_fast._checks import ACTIVATIONS, POOLINGS, check_choice, check_count, check_unicode
from splade_fast.encoders.attention import ATTENTIONS
from splade_fast.encoders.modules_list import (
    STATIC_EMBEDDING,
    is_static_embedding,
    join_kinds,
    read_modules,
)
from splade_fast.encoders.pretrained import read_json_object
from splade_fast.ops.head.scale import check_logit_scale

# SpladePooling names the function that it puts inside its own log1p; splade_fast names the whole.
SPLADE_POOLING_ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "log1p_log1p_relu"}
_SPLADE_POOLING_NAMES = {ours: theirs for theirs, ours in SPLADE_POOLING_ACTIVATIONS.items()}
_SPLADE_POOLING_FOLDER = "1_SpladePooling"
_TRANSFORMER_MODULES = ("Transformer", "MLMTransformer")
_MODEL_CONFIG_FILE = "config_sentence_transformers.json"
_OWN_DEFAULTS: dict[str, Any] = {"logit_scale": 1.0, "train_logit_scale": False, "echo": None}
_MODULES_PACKAGE = "sentence_transformers.sparse_encoder.models"


@dataclass
class EncoderSettings:
    """Settings of an encoder beside its transformer and its tokenizer.

    Pooling, attention, echo and the scale of logits are for SpladeEncoders.

    Args:
        pooling: "max", "sum", "mean" or "last".
        activation: "relu", "log1p_relu" or "log1p_log1p_relu".
        max_length: largest number of tokens of a text; None for the tokenizer's own limit.
        prompts: texts that can go before each encoded text, by name.
        default_prompt_name: name of the prompt that is used where none is named.
        lower_case: lowercase texts before the tokenizer's own normalisation.
        subfolder: folder of the transformer inside the model folder.
        attention: "bidirectional" or "causal", which the encoder sets when it is made; None leaves
            the model as it is.
        logit_scale: factor of the logits before the activation, greater than 0.
        train_logit_scale: train the factor, starting from logit_scale.
        echo: text between two copies of each text, of which the second is pooled; None: one copy.

    Raises:
        TypeError: max_length is not an integer, logit_scale is not a number, or prompts and echo
            are not texts.
        ValueError: a number is out of range, default_prompt_name is the name of no prompt, or
            pooling, activation or attention is unknown.
    """

    pooling: str = "max"
    activation: str = "log1p_relu"
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    lower_case: bool = False
    subfolder: str = ""
    attention: str | None = None
    logit_scale: float = 1.0
    train_logit_scale: bool = False
    echo: str | None = None

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.attention is not None:
            check_choice("attention", self.attention, ATTENTIONS)
        check_logit_scale(self.logit_scale)
        if self.logit_scale <= 0:
            raise ValueError(f"logit_scale must be greater than 0, got {self.logit_scale}")
        if not isinstance(self.train_logit_scale, bool):
            raise TypeError(f"train_logit_scale must be a bool, got {self.train_logit_scale!r}")
        if self.echo is not None:
            if not isinstance(self.echo, str):
                raise TypeError(f"echo must be a text, got {type(self.echo).__name__}")
            check_unicode("echo", self.echo)
        if self.max_length is not None:
            self.max_length = check_count("max_length", self.max_length, 1)
        if not isinstance(self.prompts, dict) or not all(
            isinstance(text, str) for pair in self.prompts.items() for text in pair
        ):
            raise TypeError(f"prompts must be texts by name, got {self.prompts!r}")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name must be one of {sorted(self.prompts)}, "
                f"got {self.default_prompt_name!r}"
            )

    def prompt_for(self, role: str) -> str | None:
        """Return the prompt name for a role ("query" or "document"), else the default name."""
        return role if role in self.prompts else self.default_prompt_name


def read_settings(
    name_or_path: str, hub: dict[str, Any], task: str = "document"
) -> EncoderSettings:
    """Read the settings of a SparseEncoder folder; return the defaults for a plain checkpoint.

    Args:
        name_or_path: a folder or a hub name.
        hub: `revision`, `token`, `cache_dir` and other arguments of the hub.
        task: "query" or "document", which selects the route of a Router.

    Raises:
        ValueError: the folder describes something other than a transformer and SpladePooling.
    """
    modules = read_modules(name_or_path, hub, task)
    if modules is None:
        return EncoderSettings()
    kinds = [module.kind for module in modules]
    if len(kinds) != 2 or kinds[0] not in _TRANSFORMER_MODULES or kinds[1] != "SpladePooling":
        advice = "; BagOfWordsQueryEncoder loads it" if is_static_embedding(modules) else ""
        raise ValueError(
            f"modules.json of {name_or_path} must list a Transformer and a SpladePooling, "
            f"got {join_kinds(modules)}{advice}"
        )
    folder, pooling_folder = (module.path for module in modules)
    transformer_file = os.path.join(folder, "sentence_bert_config.json")
    transformer = read_json_object(name_or_path, transformer_file, hub)
    max_length = transformer.get("max_seq_length")
    if max_length is not None and type(max_length) is not int:
        raise ValueError(
            f"max_seq_length in {transformer_file} of {name_or_path} must be a whole number or "
            f"null, got {max_length!r}"
        )
    pooling_file = os.path.join(pooling_folder, "config.json")
    pooling = read_json_object(name_or_path, pooling_file, hub)
    activation = str(pooling.get("activation_function", "relu"))
    if activation not in SPLADE_POOLING_ACTIVATIONS:
        raise ValueError(
            f"activation_function of {name_or_path} must be one of "
            f"{', '.join(SPLADE_POOLING_ACTIVATIONS)}, got {activation!r}"
        )
    prompts = _read_prompts(name_or_path, hub)
    attention = read_json_object(name_or_path, _MODEL_CONFIG_FILE, hub).get("attention")
    try:
        return EncoderSettings(
            pooling=pooling.get("pooling_strategy", "max"),
            activation=SPLADE_POOLING_ACTIVATIONS[activation],
            max_length=max_length,
            lower_case=transformer.get("do_lower_case", False),
            subfolder=folder,
            attention=attention,
            **{name: pooling[name] for name in _OWN_DEFAULTS if name in pooling},
            **prompts,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings of {name_or_path} are not supported: {error}") from error


def refuse_splade_options(prefix: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that only SpladeEncoders have.

    Args:
        prefix: words before the name of an option, for the message.
        options: values by name; those of other names and defaults pass.
    """
    for name in ("attention", *_OWN_DEFAULTS):
        value = options.get(name)
        if value is not None and value != _OWN_DEFAULTS.get(name):
            raise ValueError(
                f"{prefix}{name} must be left out for an encoder without a language-modelling "
                f"head, got {value!r}"
            )


def find_transformer(name_or_path: str, hub: dict[str, Any]) -> str:
    """Return the subfolder of the first module of a sentence-transformers folder; else "".

    Raises:
        ValueError: the first module is no Transformer.
    """
    modules = read_modules(name_or_path, hub, "document")
    if modules is None:
        return ""
    if not modules or modules[0].kind not in _TRANSFORMER_MODULES:
        advice = "; BagOfWordsQueryEncoder loads it" if is_static_embedding(modules) else ""
        raise ValueError(
            f"modules.json of {name_or_path} must list a Transformer first, "
            f"got {join_kinds(modules)}{advice}"
        )
    return modules[0].path


def sparse_encoder_files(settings: EncoderSettings) -> dict[str, Any]:
    """Return the JSON files that make a transformers folder a SparseEncoder folder as well.

    sentence-transformers refuses the folder if a setting is one that its modules lack.

    Raises:
        ValueError: SpladePooling has no such activation.
    """
    if settings.activation not in _SPLADE_POOLING_NAMES:
        raise ValueError(
            f"activation must be one of {', '.join(_SPLADE_POOLING_NAMES)} to be saved "
            f"for sentence-transformers, got {settings.activation!r}"
        )
    return {
        # Every sentence-transformers version with a SparseEncoder loads the name MLMTransformer.
        "modules.json": _module_list(
            ("", "MLMTransformer"), (_SPLADE_POOLING_FOLDER, "SpladePooling")
        ),
        "sentence_bert_config.json": {"max_seq_length": settings.max_length},
        _MODEL_CONFIG_FILE: _model_config(settings) | _attention(settings),
        f"{_SPLADE_POOLING_FOLDER}/config.json": {
            "pooling_strategy": settings.pooling,
            "activation_function": _SPLADE_POOLING_NAMES[settings.activation],
            **_own_settings(settings),
        },
    }


def read_static_embedding_settings(
    name_or_path: str, hub: dict[str, Any], subfolder: str = ""
) -> EncoderSettings:
    """Read the settings of a SparseEncoder folder that encodes queries by a SparseStaticEmbedding.

    The SparseStaticEmbedding is the only module, or alone in a Router's route for queries.

    Args:
        name_or_path: a folder or a hub name.
        hub: `revision`, `token`, `cache_dir` and other arguments of the hub.
        subfolder: folder of the SparseStaticEmbedding, if it is one of several modules.

    Raises:
        ValueError: the folder describes something other than a SparseStaticEmbedding.
    """
    modules = read_modules(name_or_path, hub, "query") or []
    if not subfolder:
        if not is_static_embedding(modules):
            advice = (
                "name its subfolder if it is one of several"
                if any(module.kind == STATIC_EMBEDDING for module in modules)
                else "SpladeEncoder loads checkpoints of language models"
            )
            raise ValueError(
                f"modules.json of {name_or_path} must list a SparseStaticEmbedding alone, "
                f"got {join_kinds(modules)}; {advice}"
            )
        subfolder = modules[0].path
    return EncoderSettings(subfolder=subfolder, **_read_prompts(name_or_path, hub))


def static_embedding_files(settings: EncoderSettings, frozen: bool) -> dict[str, Any]:
    """Return the JSON files of a SparseEncoder folder with one SparseStaticEmbedding."""
    return {
        "modules.json": _module_list(("", STATIC_EMBEDDING)),
        _MODEL_CONFIG_FILE: _model_config(settings),
        "config.json": {"frozen": frozen},
    }


def _module_list(*modules: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"{_MODULES_PACKAGE}.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]


def _model_config(settings: EncoderSettings) -> dict[str, Any]:
    return {
        "model_type": "SparseEncoder",
        "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": "dot",
    }


def _own_settings(settings: EncoderSettings) -> dict[str, Any]:
    """Return the settings that differ from what SpladePooling does, which refuses their names."""
    values = {name: getattr(settings, name) for name in _OWN_DEFAULTS}
    return {name: value for name, value in values.items() if value != _OWN_DEFAULTS[name]}


def _attention(settings: EncoderSettings) -> dict[str, str]:
    """Return the attention as an item that sentence-transformers passes over.

    The config of the model holds it as well, but not that of adapters.
    """
    return {} if settings.attention is None else {"attention": settings.attention}


def _read_prompts(name_or_path: str, hub: dict[str, Any]) -> dict[str, Any]:
    file = _MODEL_CONFIG_FILE
    config = read_json_object(name_or_path, file, hub)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(p, str | None) for p in prompts.values()
    ):
        raise ValueError(
            f"prompts in {file} of {name_or_path} must be texts by name, got {prompts!r}"
        )
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(
            f"default_prompt_name in {file} of {name_or_path} must be one of {sorted(prompts)}, "
            f"got {default!r}"
        )
    return {
        "prompts": {name: text or "" for name, text in prompts.items()},
        "default_prompt_name": default,
    }
