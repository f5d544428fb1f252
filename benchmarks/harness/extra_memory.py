"""Peak extra memory of a case: what a run needs beyond inputs, outputs and gradients."""

import gc
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Implementation, Workload
from benchmarks.harness.memory import peak_growth


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
    torch.set_num_threads(threads)
    return peak_extra_here(case, contender, case.build(floors=False))


def peak_extra_here(case: Case, contender: str, workload: Workload) -> int:
    """Measure in this process, which has to be a fresh one, on the CPU."""
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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
