"""Modules of a sentence-transformers folder, in the order in which they run."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from splade_fast.encoders.pretrained import read_json

STATIC_EMBEDDING = "SparseStaticEmbedding"
_TASKS = ("document", "query")
# sentence-transformers calls routers of queries and documents by their older name as well.
_ROUTERS = ("Router", "Asym")


class Module(NamedTuple):
    """Module of a folder: the name of its class and the path of its own folder."""

    kind: str
    path: str


def read_modules(name_or_path: str, hub: dict[str, Any], task: str) -> list[Module] | None:
    """Return the modules that encode texts of a task; None if the folder lists no modules.

    A Router stands for the modules of the route that sentence-transformers takes for the task.

    Args:
        name_or_path: a folder or a hub name.
        hub: `revision`, `token`, `cache_dir` and other arguments of the hub.
        task: "query" or "document".

    Raises:
        ValueError: task is unknown, modules.json or a Router's configuration is malformed, or the
            Router has no such route.
    """
    if task not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(map(repr, _TASKS))}, got {task!r}")
    listed = read_json(name_or_path, "modules.json", hub)
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(
        isinstance(module, dict) and {"type", "path"} <= module.keys() for module in listed
    ):
        raise ValueError(
            f"modules.json of {name_or_path} must list modules with a type and a path, "
            f"got {listed!r}"
        )
    modules = [_module(module["type"], "", module["path"], name_or_path) for module in listed]
    return _follow_routes(modules, name_or_path, hub, task)


def is_static_embedding(modules: list[Module] | None) -> bool:
    """Return whether a SparseStaticEmbedding is the only module."""
    return modules is not None and [module.kind for module in modules] == [STATIC_EMBEDDING]


def join_kinds(modules: list[Module] | None) -> str:
    """Return the names of the modules' classes for a message."""
    return ", ".join(module.kind for module in modules or []) or "nothing"


def _follow_routes(
    modules: list[Module], name_or_path: str, hub: dict[str, Any], task: str
) -> list[Module]:
    followed: list[Module] = []
    for module in modules:
        if module.kind in _ROUTERS:
            route = _read_route(module, name_or_path, hub, task)
            followed += _follow_routes(route, name_or_path, hub, task)
        else:
            followed.append(module)
    return followed


def _read_route(router: Module, name_or_path: str, hub: dict[str, Any], task: str) -> list[Module]:
    """Return the modules of a Router's route for a task."""
    folder = hub | {"subfolder": router.path}
    config = read_json(name_or_path, "router_config.json", folder)
    if config is None:  # the name in older folders
        config = read_json(name_or_path, "config.json", folder)
    try:
        routes = config["structure"]
        types = config["types"]
        name = _route_name(routes, config.get("parameters") or {}, task)
        return [_module(types[id_], router.path, id_, name_or_path) for id_ in routes[name]]
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise ValueError(
            f"router_config.json of {name_or_path} must hold types and structure with a route for "
            f"the task {task!r}, got {config!r}"
        ) from error


def _route_name(routes: dict[str, Any], parameters: dict[str, Any], task: str) -> Any:
    """Return the route that sentence-transformers takes for texts of a task."""
    mappings = parameters.get("route_mappings") or {}
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if str(key) in mappings:
            return mappings[str(key)]
    return task if task in routes else "text"


def _module(kind: Any, folder: str, path: Any, name_or_path: str) -> Module:
    """Return a module whose folder lies inside the model's folder."""
    inside = str(path)
    if PureWindowsPath(inside).anchor or ".." in PureWindowsPath(inside).parts:
        raise ValueError(
            f"{name_or_path} must name folders of modules inside itself, got {inside!r}"
        )
    joined = str(PurePosixPath(folder, inside)) if folder and inside else folder or inside
    return Module(str(kind).rpartition(".")[2], joined)
