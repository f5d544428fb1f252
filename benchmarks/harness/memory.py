"""Peak memory of this process on the CPU, as Linux counts it in /proc/self."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")


def has_peak_memory() -> bool:
    """Return whether this system tells the peak memory of a process, as Linux does."""
    return STATUS.exists()


def peak_growth(run: Callable[[], object]) -> int:
    """Return the bytes by which run() makes this process larger, at its largest.

    Raises:
        RuntimeError: this system does not tell the memory of a process.
    """
    if not has_peak_memory():
        raise RuntimeError(f"{STATUS} must exist; peak memory needs Linux")
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # peak := current
    before = resident_bytes("VmHWM")
    run()
    return resident_bytes("VmHWM") - before


def return_freed_memory() -> None:
    """Give the memory that the allocator keeps for later back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(field: str) -> int:
    """Return VmHWM, the peak of this process, or another field of /proc/self/status in kB.

    Raises:
        RuntimeError: this system does not tell the memory of a process.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    if found is None:
        raise RuntimeError(f"{STATUS} must have {field}; peak memory needs Linux")
    return int(found[1]) << 10
