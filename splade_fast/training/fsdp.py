"""FSDP2: weights, gradients and optimizer states of a training model, sharded over the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.training_args import OptimizerNames

from splade_fast.training.arguments import SpladeTrainingArguments
from splade_fast.training.model import TrainingModel

_VARIABLE = "ACCELERATE_USE_FSDP"
# Optimizers that treat each entry of a weight alone, so that a shard is as good as the whole.
_OPTIMIZERS = (
    OptimizerNames.ADAMW_TORCH,
    OptimizerNames.ADAMW_TORCH_FUSED,
    OptimizerNames.SGD,
    OptimizerNames.ADAGRAD,
    OptimizerNames.RMSPROP,
)
# Arguments that would need the whole weights, and the only values that they can have.
_ONLY_VALUES = {
    "fp16": (False, "; use bf16"),
    "fp16_full_eval": (False, ""),
    "bf16_full_eval": (False, ""),
    "torch_compile": (False, ""),
    "auto_find_batch_size": (False, ""),
    "save_on_each_node": (False, ""),
}


def prepare_plugin(plugin: Any, args: SpladeTrainingArguments, model: TrainingModel) -> None:
    """Set the options of accelerate's plugin that a training model needs.

    Each transformer layer is gathered alone, and the other weights of each encoder together.

    Args:
        plugin: the `FullyShardedDataParallelPlugin`.
        args: arguments of the training.
        model: the model, before it is sharded.

    Raises:
        ValueError: an option does not work with FSDP2 or with the model.
    """
    _check_options(plugin, args)
    _check_dtypes(model, is_mixed=args.bf16)
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    names = plugin.transformer_cls_names_to_wrap
    if names is None:
        names = _find_layer_classes(model)
    else:
        _check_layer_classes(names, model)
    encoders = {type(encoder).__name__: None for encoder in (model.encoder, model.query_encoder)}
    plugin.transformer_cls_names_to_wrap = [*names, *encoders]
    if args.bf16:
        # Labels, vectors and losses keep their precision, and gradients are added in float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@contextmanager
def fsdp_of_this_trainer_alone() -> Iterator[None]:
    """Undo in the environment what accelerate tells later accelerators of this process."""
    before = os.environ.get(_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


def shard_on_cpus(accelerator: Any, args: SpladeTrainingArguments) -> None:
    """Make an accelerator use FSDP2 on CPUs, where it ignores its plugin."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    state.distributed_type = DistributedType.FSDP


@torch.no_grad()
def broadcast_weights(model: TrainingModel) -> None:
    """Give all ranks the weights of the first one, as DistributedDataParallel does.

    Buffers stay as they are: caches and running frequencies belong to their rank.
    """
    for parameter in model.parameters():
        dist.broadcast(parameter, 0)


def _check_options(plugin: Any, args: SpladeTrainingArguments) -> None:
    """Raise ValueError for options that do not work with FSDP2 or with training models."""
    if plugin.fsdp_version != 2:
        raise ValueError(f"version in fsdp_config must be 2, got {plugin.fsdp_version}")
    if plugin.activation_checkpointing:
        raise ValueError(
            "activation_checkpointing in fsdp_config must be false, because it draws other dropout "
            "in the backward pass, got true; the argument activation_checkpointing does not"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("cpu_offload in fsdp_config must be false, got true")
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    if policy not in (None, transformer_auto_wrap_policy):
        raise ValueError(
            "auto_wrap_policy in fsdp_config must be TRANSFORMER_BASED_WRAP, got SIZE_BASED_WRAP, "
            "which would part the decoder's weights from the head that reads them"
        )
    for name, (only, advice) in _ONLY_VALUES.items():
        if getattr(args, name) != only:
            raise ValueError(
                f"{name} must be {only} with fsdp{advice}, got {getattr(args, name)!r}"
            )
    if args.optim not in _OPTIMIZERS:
        known = ", ".join(name.value for name in _OPTIMIZERS)
        raise ValueError(
            f"optim must be one of {known} with fsdp, whose states are sharded as the weights "
            f"are, got {OptimizerNames(args.optim).value}"
        )


def _check_dtypes(model: TrainingModel, *, is_mixed: bool) -> None:
    """Raise ValueError if weights to train have different dtypes; mixed precision casts them."""
    dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1 and not is_mixed:
        raise ValueError(
            "the weights to train must have one dtype with fsdp, got "
            f"{' and '.join(sorted(dtypes))}"
        )


def _find_layer_classes(model: TrainingModel) -> list[str]:
    """Return the names of the classes of the encoders' layers."""
    names: dict[str, None] = {}
    for encoder in {id(e): e for e in (model.encoder, model.query_encoder)}.values():
        lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList)]
        layers = max(lists, key=_count_entries, default=())
        names |= dict.fromkeys(type(layer).__name__ for layer in layers)
    return [name for name in names if not _shares_weights(name, model)]


def _check_layer_classes(names: list[str], model: TrainingModel) -> None:
    """Raise ValueError unless modules of these classes can be gathered alone."""
    known = {type(part).__name__ for part in model.modules()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"transformer_layer_cls_to_wrap in fsdp_config must name classes of modules of "
                f"the model, got {name}"
            )
        if _shares_weights(name, model):
            raise ValueError(
                f"transformer_layer_cls_to_wrap in fsdp_config must name modules that share no "
                f"weight with others, such as {', '.join(_find_layer_classes(model))}, got {name}"
            )


def _shares_weights(name: str, model: TrainingModel) -> bool:
    """Return whether a module of a class has a weight that a module outside has as well."""
    for part in model.modules():
        if type(part).__name__ != name:
            continue
        inside = set(part.modules())
        others = {
            id(parameter)
            for other in model.modules()
            if other not in inside
            for parameter in other._parameters.values()
        }
        if any(id(parameter) in others for parameter in part.parameters()):
            return True
    return False


def _count_entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
