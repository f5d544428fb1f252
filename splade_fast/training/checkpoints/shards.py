"""Optimizer states and weights whose tensors FSDP2 has sharded over the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from splade_fast._distributed import is_shard
from splade_fast.encoders.sharding import gather, shard_like


def gather_tree(tree: Any, *, is_kept: bool) -> Any:
    """Return nested containers with whole tensors in the place of shards.

    All processes must call it. Those that do not keep the result get None for a shard.
    """
    return _map_tensors(tree, lambda x: gather(x, is_kept=is_kept) if is_shard(x) else x)


def cut_tree(tree: Any) -> Any:
    """Return nested containers with the tensor of this process in the place of a shard."""
    return _map_tensors(tree, lambda x: x.to_local() if is_shard(x) else x)  # type: ignore[attr-defined]


def shard_optimizer_state(state: Any, groups: list[dict[str, Any]], *, is_cut: bool) -> Any:
    """Return the state of an optimizer with shards like those of its parameters.

    Args:
        state: `state_dict` of the optimizer, with whole tensors or those of this process.
        groups: the optimizer's groups of parameters.
        is_cut: whether the tensors are those of this process.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    sharded = {
        key: {
            name: _shard_entry(value, parameters[key], is_cut=is_cut)
            for name, value in entries.items()
        }
        for key, entries in state["state"].items()
        if key < len(parameters)  # the optimizer refuses the state of another one
    }
    return {**state, "state": sharded}


def _shard_entry(value: Any, parameter: nn.Parameter, *, is_cut: bool) -> Any:
    """Return a tensor with the shape of the parameter as a shard like it, or any other value."""
    if not isinstance(value, Tensor) or not is_shard(parameter):
        return value
    shard: Any = parameter.detach()
    if not is_cut:
        return shard_like(value, shard) if value.shape == shard.shape else value
    if value.shape != shard.to_local().shape:
        return value
    return type(shard).from_local(
        value.to(shard.device),
        shard.device_mesh,
        shard.placements,
        run_check=False,
        shape=shard.shape,
        stride=shard.stride(),
    )


def _map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(value, function) for value in tree)
    return tree
