"""Peak extra memory: what a run needs beyond its inputs and outputs (gradients included)."""

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Implementation, Workload


def peak_extra_bytes(
    case: Case, contender: str, implementation: Implementation, workload: Workload
) -> int:
    if case.device == "cuda":
        return _peak_on_cuda(case, implementation, workload)
    # Each in a process of its own: pages that an earlier contender left to the allocator would
    # be reused unseen. A fork server that has only imported torch makes a process cheap.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(case).__module__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_on_cpu, case, contender, torch.get_num_threads()).result()


def _peak_on_cuda(case: Case, implementation: Implementation, workload: Workload) -> int:
    workload.clear_gradients()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = workload.run(implementation, case.direction)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    extra = peak - before - _bytes([output, *workload.gradients().values()])
    workload.clear_gradients()
    return extra


def _peak_on_cpu(case: Case, contender: str, threads: int) -> int:
    """Runs in a fresh process; Linux only."""
    torch.set_num_threads(threads)
    return peak_extra_here(case, contender, case.build(floors=False))


def peak_extra_here(case: Case, contender: str, workload: Workload) -> int:
    """In this process, which has to be a fresh one, on the CPU; Linux only."""
    implementation = case.implementation(contender)
    # Libraries, threads and their workspaces do not count, nor does compiling for this shape.
    warm_up = workload if contender == "compile" else case.tiny().build(floors=False)
    warm_up.run(implementation, case.direction)
    warm_up.clear_gradients()
    outputs: list[Tensor] = []
    growth = peak_growth(lambda: outputs.append(workload.run(implementation, case.direction)))
    extra = max(0, growth - _bytes([*outputs, *workload.gradients().values()]))
    workload.clear_gradients()
    return extra


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which this process is larger, at its largest, while run() runs; Linux only."""
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # peak := current
    before = resident_bytes("VmHWM")
    run()
    return resident_bytes("VmHWM") - before


def return_freed_memory() -> None:
    """What the allocator keeps for later is the system's again; Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(field: str) -> int:
    """VmHWM, the peak of this process, or another of its fields that count kB; Linux only."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; peak memory needs Linux")
    return int(found[1]) << 10


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
