"""Change the class of an object in place to a subclass that looks like the original.

The object keeps its identity, so every loss or trainer that refers to it sees the change. The
subclass has the name and the module of the original, which sentence-transformers writes to its
files, and is pickled by reference to the original.
"""

from __future__ import annotations

import copyreg
import inspect
from functools import cache
from typing import Any, ClassVar

from torch import nn


class Role:
    """Base of classes whose methods replace the methods of the original class.

    Python changes the class of an object only if the original comes first among the bases of the
    new class. So the methods of the role are copied into the new class, and they reach the replaced
    methods by `_original`.
    """

    _role: ClassVar[Any]
    _original: ClassVar[Any]


def swap_in(role: type[Role], module: nn.Module) -> None:
    """Let the methods of `role` replace those of the module's class."""
    if not isinstance(module, role):
        classes: Any = (role, type(module))
        module.__class__ = _subclass(*classes)


def swap_back(module: nn.Module) -> None:
    """Undo `swap_in`; nothing where there is nothing to undo."""
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> Any:
    """Return the class that a module has without a role."""
    return module._original if isinstance(module, Role) else type(module)


@cache
def _subclass(role: Any, original: Any) -> Any:
    namespace = {
        name: value
        for kind in reversed(role.__mro__)
        for name, value in vars(kind).items()
        if inspect.isfunction(value)
    }
    namespace |= {name: getattr(original, name) for name in ("__module__", "__qualname__")}
    namespace |= {"__doc__": original.__doc__, "_role": role, "_original": original}
    metaclass: Any = type(original)
    return _metaclass(metaclass)(original.__name__, (original, role), namespace)


@cache
def _metaclass(original: Any) -> Any:
    """Return a new metaclass, since pickle looks up how to pickle a class by its metaclass."""
    metaclass = type(original.__name__, (original,), {})
    copyreg.pickle(metaclass, _by_reference)
    return metaclass


def _by_reference(subclass: Any) -> tuple[Any, tuple[Any, Any]]:
    return _subclass, (subclass._role, subclass._original)
