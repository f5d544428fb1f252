"""Configuration of `splade-fast train`: a YAML file and flags, parsed into dataclasses.

Transformers' HfArgumentParser converts and checks all values. A key of the file becomes a flag, so
the file and the command line follow the same rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from splade_fast.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    SpladeTrainingArguments,
)
from splade_fast.training.objective_arguments import ObjectiveArguments

_SECTIONS: Any = (ModelArguments, DataArguments, SpladeTrainingArguments, RunArguments)
_USAGE = """\
Usage: splade-fast train --config FILE.yaml [--flag value …]

Train an encoder. The keys of the file are the flags below without their dashes; a flag overrides a
key. With several processes: torchrun --nproc-per-node N -m splade_fast train …
"""
_MOST_USED = """
    output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate weight_decay
    max_grad_norm num_train_epochs max_steps warmup_steps lr_scheduler_type bf16
    activation_checkpointing seed logging_steps eval_strategy eval_steps per_device_eval_batch_size
    save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model
    greater_is_better resume_from_checkpoint dataloader_num_workers report_to ddp_backend
"""


class ConfigError(ValueError):
    """Error of an unknown flag or key, or of a value that it cannot have."""


@dataclass
class Configuration:
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: SpladeTrainingArguments
    run: RunArguments

    @property
    def output_dir(self) -> Path:
        """Folder of the checkpoints and the trained model."""
        return Path(str(self.training.output_dir))


def parse_configuration(arguments: Sequence[str]) -> Configuration:
    """Parse flags, and the YAML file that --config names.

    Raises:
        ConfigError: a flag or key is unknown, or has a value that it cannot have.
        ImportError: there is a file, but the package pyyaml is missing.
        ValueError: values contradict each other.
    """
    first_parser = _Parser([], allow_abbrev=False, add_help=False)
    first_parser.add_argument("--config", type=Path)
    known, flags = first_parser.parse_known_args(arguments)
    if flags and not flags[0].startswith("-"):
        # Checked here, because a list at the end of the file would take the argument.
        raise ConfigError(f"expected a flag, got {flags[0]!r}")
    file_flags = [] if known.config is None else _read_flags(known.config)
    parser = _Parser(_SECTIONS, allow_abbrev=False, add_help=False)
    # The last of several equal flags counts.
    *sections, unknown = parser.parse_args_into_dataclasses(
        [*file_flags, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"expected a flag, got {flag!r}")
        raise ConfigError(f"unknown flag {flag}{_suggest_names(flag.lstrip('-'), '--')}")
    return Configuration(*sections)


def format_help(*, should_list_all: bool = False) -> str:
    """Return all flags with their help.

    Args:
        should_list_all: whether to list all fields of transformers' TrainingArguments, or the most
            used ones.
    """
    objective = {f.name for f in dataclasses.fields(ObjectiveArguments)}
    training = {f.name: f for f in dataclasses.fields(SpladeTrainingArguments) if f.init}
    transformers = {f.name for f in dataclasses.fields(TrainingArguments)}
    listed = transformers if should_list_all else transformers & set(_MOST_USED.split())
    batches = [name for name in training if name not in transformers | objective]
    most_used = "Training (all of transformers' TrainingArguments: --help-all)"
    sections = {
        "Run": dataclasses.fields(RunArguments),
        "Model": dataclasses.fields(ModelArguments),
        "Data": dataclasses.fields(DataArguments),
        "Batches": [training[name] for name in batches],
        "Objective": [training[name] for name in training if name in objective],
        "Training" if should_list_all else most_used: [
            training[name] for name in training if name in listed
        ],
    }
    lines = [_USAGE]
    for title, fields in sections.items():
        lines += [f"{title}:", *(_format_field(field) for field in fields), ""]
    return "\n".join(lines)


def _format_field(field: dataclasses.Field[Any]) -> str:
    text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    if field.default is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            text += " [required]"
    elif field.default not in (None, ""):
        text += f" [{getattr(field.default, 'value', field.default)}]"
    indent = " " * 6
    wrapped = textwrap.wrap(text, 96, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"  --{field.name}", *wrapped])


class _Parser(HfArgumentParser):
    """Parser that raises its errors instead of printing two hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _read_flags(path: Path) -> list[str]:
    """Return the keys and values of a YAML file as flags."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "--config needs the package pyyaml: pip install splade_fast[train]"
        ) from error
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
        written = yaml.BaseLoader(text).get_single_data()  # the same with strings for all scalars
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    keys = [key.value for key, _ in yaml.compose(text).value]
    repeated = [key for key in keys if keys.count(key) > 1]
    if repeated:
        raise ConfigError(f"{path} must hold each key once, got {repeated[0]!r} twice")
    hints = _type_hints()
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ConfigError(f"{path}: unknown key {key!r}{_suggest_names(name)}")
        if value is None:
            raise ConfigError(f"{path}: {name} must have a value; leave it out for the default")
        if isinstance(value, list) and not _holds_list(hints[name]):
            raise ConfigError(f"{path}: {name} must be one value, got {value!r}")
        if _holds_text(hints[name]) and not isinstance(value, dict):
            # YAML 1.1 reads no as false and 1.10 as 1.1.
            value = written.get(key, value)
        flags += _make_flag(name, value)
    return flags


def _type_hints() -> dict[str, Any]:
    return {name: hint for section in _SECTIONS for name, hint in get_type_hints(section).items()}


def _holds_text(hint: Any) -> bool:
    """Return whether a type is str or enum, or a union or list of them."""
    members = get_args(hint)
    if members:
        return any(_holds_text(member) for member in members)
    return isinstance(hint, type) and issubclass(hint, str | enum.Enum)


def _holds_list(hint: Any) -> bool:
    """Return whether a type is a list, or a union with one."""
    return get_origin(hint) is list or any(_holds_list(member) for member in get_args(hint))


def _make_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)] if value else []
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _known_names() -> set[str]:
    return {f.name for section in _SECTIONS for f in dataclasses.fields(section) if f.init}


def _suggest_names(name: str, dashes: str = "") -> str:
    """Return the end of a message about an unknown name: the known names near it."""
    near = difflib.get_close_matches(name.replace("-", "_"), sorted(_known_names()), n=3)
    return "; near it: " + ", ".join(dashes + key for key in near) if near else ""
