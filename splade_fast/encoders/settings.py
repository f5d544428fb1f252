"""EncoderSettings, and the JSON files in which sentence-transformers keeps them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from splade_fast._checks import check_count
from splade_fast.encoders.modules_list import (
    STATIC_EMBEDDING,
    is_static_embedding,
    join_kinds,
    read_modules,
)
from splade_fast.encoders.pretrained import read_json_object

# SpladePooling names the function that it puts inside its own log1p; splade_fast names the whole.
SPLADE_POOLING_ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "log1p_log1p_relu"}
_SPLADE_POOLING_NAMES = {ours: theirs for theirs, ours in SPLADE_POOLING_ACTIVATIONS.items()}
_SPLADE_POOLING_FOLDER = "1_SpladePooling"
_TRANSFORMER_MODULES = ("Transformer", "MLMTransformer")
_MODULES_PACKAGE = "sentence_transformers.sparse_encoder.models"


@dataclass
class EncoderSettings:
    """Settings of an encoder beside its transformer and its tokenizer.

    Args:
        pooling: "max" or "sum".
        activation: "relu", "log1p_relu" or "log1p_log1p_relu".
        max_length: largest number of tokens of a text; None for the tokenizer's own limit.
        prompts: texts that can go before each encoded text, by name.
        default_prompt_name: name of the prompt that is used where none is named.
        lower_case: lowercase texts before the tokenizer's own normalisation.
        subfolder: folder of the transformer inside the model folder.

    Raises:
        TypeError: max_length is not an integer, or prompts are not texts by name.
        ValueError: max_length is less than 1, or default_prompt_name is the name of no prompt.
    """

    pooling: str = "max"
    activation: str = "log1p_relu"
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    lower_case: bool = False
    subfolder: str = ""

    def __post_init__(self) -> None:
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
    pooling = read_json_object(name_or_path, os.path.join(pooling_folder, "config.json"), hub)
    activation = str(pooling.get("activation_function", "relu"))
    if activation not in SPLADE_POOLING_ACTIVATIONS:
        raise ValueError(
            f"activation_function of {name_or_path} must be one of "
            f"{', '.join(SPLADE_POOLING_ACTIVATIONS)}, got {activation!r}"
        )
    return EncoderSettings(
        pooling=pooling.get("pooling_strategy", "max"),
        activation=SPLADE_POOLING_ACTIVATIONS[activation],
        max_length=max_length,
        lower_case=transformer.get("do_lower_case", False),
        subfolder=folder,
        **_read_prompts(name_or_path, hub),
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
        "config_sentence_transformers.json": _model_config(settings),
        f"{_SPLADE_POOLING_FOLDER}/config.json": {
            "pooling_strategy": settings.pooling,
            "activation_function": _SPLADE_POOLING_NAMES[settings.activation],
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
        "config_sentence_transformers.json": _model_config(settings),
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


def _read_prompts(name_or_path: str, hub: dict[str, Any]) -> dict[str, Any]:
    file = "config_sentence_transformers.json"
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
