"""Replacement of an object's class in place by a subclass that looks like the original.

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
    new class. Therefore the methods of the role are copied into the new class, and call the
    replaced methods through `_original`.
    """

    _role: ClassVar[Any]
    _original: ClassVar[Any]


def swap_in(role: type[Role], module: nn.Module) -> None:
    """Replace methods of the module's class by the methods of `role`."""
    if not isinstance(module, role):
        classes: Any = (role, type(module))
        module.__class__ = _subclass(*classes)


def swap_back(module: nn.Module) -> None:
    """Undo `swap_in`. A module without a role does not change."""
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
    """Return a new metaclass, because pickle chooses the reducer of a class by its metaclass."""
    metaclass = type(original.__name__, (original,), {})
    copyreg.pickle(metaclass, _reduce_class)
    return metaclass


def _reduce_class(subclass: Any) -> tuple[Any, tuple[Any, Any]]:
    return _subclass, (subclass._role, subclass._original)
