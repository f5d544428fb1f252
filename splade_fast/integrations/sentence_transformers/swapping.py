"""Objects that change their class in place, for a subclass that looks like the original.

The object stays the same one, so whatever refers to it, a loss or a trainer, sees the change. The
subclass has the name and the module of the original, by which sentence-transformers writes its
files, and pickles by reference to the original.
"""

from __future__ import annotations

import copyreg
import inspect
from functools import cache
from typing import Any, ClassVar

from torch import nn


class Role:
    """Base of classes whose methods replace those of the original class.

    Python gives an object another class only where the original comes first among its bases, so
    the methods are copied in front of it, and reach the ones they replace by `_original`.
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
    """One of its own, since pickle asks a class's metaclass how to pickle it."""
    metaclass = type(original.__name__, (original,), {})
    copyreg.pickle(metaclass, _by_reference)
    return metaclass


def _by_reference(subclass: Any) -> tuple[Any, tuple[Any, Any]]:
    return _subclass, (subclass._role, subclass._original)
