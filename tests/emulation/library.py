"""Build the CUDA ops with the emulator, and run them in place of the CPU ops."""

import ctypes
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import splade_fast  # noqa: F401  registers the CPU ops
from tests.emulation.prepare import LIBRARY

ROOT = Path(__file__).parents[2]
SANITIZER = os.environ.get("EMULATION_SANITIZER", "")  # sanitized.py sets it: address or thread


def ops_with_kernels() -> list[str]:
    """Return the names of the ops with a CUDA kernel."""
    sources = (path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu"))
    return re.findall(r'm\.impl\("(\w+)"', "".join(sources))


def build_folder(sanitizer: str) -> Path:
    return ROOT / "build" / "-".join(filter(None, ["emulation", sanitizer]))


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]


def build(sanitizer: str = "") -> None:
    """Build the library where it is out of date, for a sanitizer or for none."""
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    compilers = chosen or ["c++", "g++", "clang++"]  # where CMake looks
    if not any(map(shutil.which, compilers)):
        pytest.skip(f"the emulation needs a C++ compiler, and there is no {' or '.join(compilers)}")
    folder = build_folder(sanitizer)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several workers builds
        if not (folder / "build.ninja").exists():  # from then on the build looks after it
            run(
                *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                *("-DSPLADE_FAST_EMULATION=ON", "-DSPLADE_FAST_CUDA=0"),
                f"-DSPLADE_FAST_SANITIZE={sanitizer}",
                f"-DPython_EXECUTABLE={sys.executable}",
            )
        jobs = len(os.sched_getaffinity(0))
        run("cmake", "--build", str(folder), "--target", "emulation", "--parallel", str(jobs))


class Emulator:
    """The emulated ops."""

    def __init__(self) -> None:
        if not SANITIZER:  # sanitized.py builds: compilers can hang under a preloaded sanitizer
            build()
        path = build_folder(SANITIZER) / f"{LIBRARY}.so"
        torch.ops.load_library(path)
        self.ops = getattr(torch.ops, LIBRARY)
        self._library = ctypes.CDLL(str(path))
        # The product of bfloat16 or float16 in float32, which torch has on CUDA alone.
        self._aten = torch.library.Library("aten", "IMPL")
        self._aten.impl("mm.dtype_out", _product_in_dtype, "CPU")

    def configure(self, seed: int, multiprocessors: int, clusters: int) -> None:
        """Set the seed of the order of threads and copies, and the size of the GPU."""
        self._library.emulation_configure(seed, multiprocessors, clusters)

    @contextmanager
    def mistake(self, name: str) -> Iterator[None]:
        """Switch a mistake of mistakes.py on."""
        self._library.emulation_make_mistake(name.encode())
        try:
            yield
        finally:
            self._library.emulation_make_mistake(b"")

    @contextmanager
    def written_memory(self) -> Iterator[None]:
        """Fail where a tensor copy reads memory that nothing has written: conftest.py fills it."""
        self._library.emulation_expect_written_memory(True)
        try:
            yield
        finally:
            self._library.emulation_expect_written_memory(False)

    def pin(self, table: Tensor | None, *, is_work_running: bool) -> None:
        """Make a table pinned memory, and let the work of all launches seem to run on or not."""
        address = ctypes.c_void_p(None if table is None else table.data_ptr())
        self._library.emulation_pin(address, is_work_running)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the functions of splade_fast run the emulated ops."""
        with torch.library._scoped_library("splade_fast", "IMPL") as library:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                for name in ops_with_kernels():
                    library.impl(name, getattr(self.ops, name).default, "CPU", allow_override=True)
            yield


def _product_in_dtype(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return torch.mm(a.to(dtype), b.to(dtype), out=out)
