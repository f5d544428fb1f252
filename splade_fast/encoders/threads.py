"""Guards of what threads that use one model share: its tokenizer and its training mode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


@dataclass
class _Mode:
    """Mode that a module had before the first of several users evaluated it."""

    is_training: bool
    num_users: int = 0


# The objects themselves hold no locks, so that they can be pickled, copied and sent to processes.
_lock = Lock()
_tokenizer_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_modes: WeakKeyDictionary[nn.Module, _Mode] = WeakKeyDictionary()
_has_used_threads = False  # of torch, to encode


def tokenizer_lock(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the lock that a thread holds while it uses the tokenizer.

    Each call of a tokenizer stores its truncation and padding in the tokenizer, or in the backend
    that it shares with its copies, and a call of another thread would use these.
    """
    shared = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    with _lock:
        return _tokenizer_locks.setdefault(shared, RLock())


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode in the block; then restore the mode of each submodule.

    The modes are restored when the last of several threads leaves the block. Modules that have
    submodules in common may be evaluated at the same time.
    """
    global _has_used_threads
    _has_used_threads = _has_used_threads or torch.get_num_threads() > 1
    with _lock:
        # Usually all modules are in evaluation mode, and no thread has to restore another.
        users = [m for m in submodules(module) if m.training or (_modes and m in _modes)]
        for submodule in users:
            _modes.setdefault(submodule, _Mode(submodule.training)).num_users += 1
            submodule.training = False
    try:
        yield
    finally:
        with _lock:
            for submodule in users:
                mode = _modes[submodule]
                mode.num_users -= 1
                if mode.num_users == 0:
                    submodule.training = mode.is_training
                    del _modes[submodule]


def submodules(module: nn.Module) -> list[nn.Module]:
    """Return what `module.modules()` yields, in another order and several times as fast.

    For a single short text, an encoder would spend a tenth of the time in `modules()`.
    """
    found = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _forget_other_threads() -> None:
    """Make a new lock in a forked process, in which the threads that hold locks do not run.

    The threads of OpenMP do not run there either: if the parent has used them, torch would wait for
    them for ever.
    """
    global _lock
    if _has_used_threads:
        torch.set_num_threads(1)
    _lock = Lock()
    _tokenizer_locks.clear()
    _modes.clear()


if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_forget_other_threads)
