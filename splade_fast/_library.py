"""Load the compiled op libraries, and tell which are loaded and why others are not."""

import ctypes
import functools
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from splade_fast._version import __version__

_FOLDER = Path(__file__).parent
_CPU = torch.device("cpu")  # comparing devices is ten times faster than reading device.type


def build_info() -> dict[str, Any]:
    """Return facts about the build, and which compiled libraries are loaded.

    Returns:
        A dict with the versions of splade_fast (``version``) and torch (``torch``), the facts that
        the build recorded (``built``: compiler, CUDA architectures, …), for ``cpu`` and ``cuda``
        whether the library is ``loaded`` and ``why_not``, and the instruction set of the CPU
        kernels (``cpu_instruction_set``).

    Example::

        >>> info = sf.build_info()
        >>> info["version"] == sf.__version__
        True
        >>> sorted(info["cuda"])
        ['loaded', 'why_not']
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "built": dict(_STATE.built),
        "cpu": {"loaded": _STATE.cpu_reason is None, "why_not": _STATE.cpu_reason},
        "cuda": {"loaded": _STATE.cuda_reason is None, "why_not": _STATE.cuda_reason},
        "cpu_instruction_set": cpu_instruction_set(),
    }


def is_cpu_library_loaded() -> bool:
    """Return whether the library with the op schemas and the CPU kernels is loaded."""
    return _STATE.cpu_reason is None


def has_kernels(device: torch.device) -> bool:
    """Return whether there are compiled kernels for a device; warn once per type where not.

    Raises:
        RuntimeError: the device is a GPU whose architecture is not in the build.
    """
    if device == _CPU or device.type in ("cpu", "meta"):
        reason = _STATE.cpu_reason
    elif device.type == "cuda":
        reason = _STATE.cuda_reason
        if reason is None:
            _check_architecture(device.index if device.index is not None else -1)
    else:
        reason = f"there are none for {device.type} devices"
    if reason is not None:
        _warn_once(device.type, reason)
    return reason is None


def has_cuda_kernels(name: str) -> bool:
    """Return whether the CUDA library was built with kernels of this name, such as head_sm90a."""
    return name in str(_STATE.built.get("cuda_kernels", "")).split()


@functools.cache
def cuda_capability(index: int) -> tuple[int, int]:
    """Return the compute capability of a GPU, which torch takes microseconds to find."""
    return torch.cuda.get_device_capability(index)


class _State:
    """Outcome of loading. A reason is None where the library is loaded."""

    def __init__(self) -> None:
        self.built: dict[str, Any] = {}
        self.cpu_reason: str | None = None
        self.cuda_reason: str | None = None
        self._load()

    def _load(self) -> None:
        if os.environ.get("SPLADE_FAST_REFERENCE") == "1":
            self.cpu_reason = self.cuda_reason = "SPLADE_FAST_REFERENCE=1 is set"
            return
        try:
            self.built = _read_build_facts()
        except OSError as error:
            self.cpu_reason = self.cuda_reason = f"the package was not built ({error})"
            return
        _check_versions(self.built)
        torch.ops.load_library(_FOLDER / "_ops_cpu.so")
        self.cuda_reason = self._load_cuda()

    def _load_cuda(self) -> str | None:
        library = _FOLDER / "_ops_cuda.so"
        if not library.exists():
            return "it was not built: no nvcc was found, or SPLADE_FAST_CUDA=0"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} has no CUDA"
        torch.ops.load_library(library)
        return None


def _read_build_facts() -> dict[str, Any]:
    """Return the facts that the build recorded.

    The libraries of the ops serve every version of Python, the module `_C` one version. Other
    versions read the same facts from the library.

    Raises:
        OSError: the package was not built.
    """
    try:
        return dict(importlib.import_module("splade_fast._C").build_facts())
    except ImportError:
        text = _call_library("splade_fast_build_facts")
    return dict(line.split("=", 1) for line in (text or "").splitlines())


def _call_library(name: str) -> str | None:
    """Call a C function of the CPU library that returns a string or null."""
    function = ctypes.CDLL(str(_FOLDER / "_ops_cpu.so"))[name]
    function.restype = ctypes.c_char_p
    returned: bytes | None = function()
    return returned.decode() if returned is not None else None


def _check_versions(built: dict[str, Any]) -> None:
    """Raise ImportError if the build is of another version or needs a newer torch."""
    if built["version"] != __version__:
        raise ImportError(
            f"splade_fast {__version__} found a library built for {built['version']}: "
            "reinstall splade_fast"
        )
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    needed = tuple(int(part) for part in built["torch_target"].split("."))
    if found < needed:
        raise ImportError(
            f"splade_fast was built for torch >= {built['torch_target']}, "
            f"found torch {torch.__version__}"
        )


@functools.cache
def _check_architecture(index: int) -> None:
    """Raise RuntimeError for a GPU for which neither machine code nor PTX was compiled."""
    device = torch.device("cuda", index if index >= 0 else torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    architectures = str(_STATE.built["cuda_architectures"]).split()
    if not any(_runs_on(architecture, major, minor) for architecture in architectures):
        raise RuntimeError(
            f"splade_fast was built for {', '.join(architectures)}, found sm_{major}{minor} "
            f"({torch.cuda.get_device_name(device)}); "
            f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Return whether code for an architecture runs on a compute capability.

    Code for sm_XY runs on major X from minor Y up, code for sm_XYa on X.Y alone, and compute_XY
    (PTX) on X.Y and everything later.
    """
    kind, _, number = architecture.partition("_")
    built_major, built_minor = divmod(int(number.rstrip("a")), 10)
    if number.endswith("a"):
        return (built_major, built_minor) == (major, minor)
    if kind == "compute":
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"splade_fast runs in plain PyTorch on {device_type}, without its kernels: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def cpu_instruction_set() -> str | None:
    """Return the instruction set of the CPU kernels.

    It is None without compiled kernels, and where SPLADE_FAST_ISA names an unknown set.
    """
    if _STATE.cpu_reason is not None:
        return None
    return _call_library("splade_fast_cpu_instruction_set")


_STATE = _State()
