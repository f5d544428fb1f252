"""Speed of all ops on a GPU in two minutes: a few shapes, each beside its floor.

Kernels are timed by replays of a CUDA graph, without the work of the host; an op that cannot be
captured is timed by its calls, and its row says so. Without a GPU the same code runs on tiny inputs
on the CPU, as a rehearsal. "tiny" measures only such inputs, for a checker of memory accesses.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases.head import HeadCase
from benchmarks.harness.case import Case, Workload
from benchmarks.harness.checks import check, relative_error
from benchmarks.harness.results import FLOOR, TIME, Measurement
from benchmarks.harness.timing import Contender, Rounds, fastest, time_in_turns
from benchmarks.window.heads import run_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("chunked", "fused", "screened")
DTYPE = torch.bfloat16
# batch, length, dim, vocabulary, layout
SHAPES = (
    (32, 128, 768, 30522, "padded"),
    (128, 256, 768, 30522, "padded"),
    (1024, 24, 768, 30522, "packed"),
    (256, 128, 384, 30522, "packed"),
    (64, 512, 768, 50_368, "packed"),
    (32, 512, 1024, 250_002, "padded"),
)
# The first cases of each, with the shapes that users have.
OTHERS = {"prune": 4, "score": 2, "sample": 4, "gather": 5, "negative_cache": 2, "pool": 2}
_WARM_UPS = 3


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    """Return a measurement for each shape of the head, for its backward, and for the other ops."""
    heads = {
        f"head B{batch} L{length} D{dim} V{vocab} {kind}": HeadCase(
            direction="forward",
            dtype=DTYPE,
            device=DEVICE,
            batch=batch,
            length=length,
            dim=dim,
            vocab=vocab,
            kind="packed" if kind == "packed" else "padded",
        )
        for batch, length, dim, vocab, kind in SHAPES
    }
    backward = dataclasses.replace(next(iter(heads.values())), direction="forward+backward")
    found = {name: partial(_measure_head, _sized(case), rounds) for name, case in heads.items()}
    found["backward"] = partial(_measure_op, _sized(backward), rounds)
    for op, count in OTHERS.items():
        is_rehearsal = DEVICE == "cpu"
        for number, case in enumerate(cases.load(op, DEVICE, [DTYPE], quick=is_rehearsal)[:count]):
            found[f"{op} {number}"] = partial(_measure_op, case, rounds)
    tiny = next(iter(heads.values())).tiny()
    found["tiny head"] = partial(_measure_head, tiny, rounds)
    for op in OTHERS:
        case = cases.load(op, DEVICE, [DTYPE], quick=True)[0]
        found[f"tiny {op}"] = partial(_measure_op, case, rounds)
    return found


def _sized(case: HeadCase) -> HeadCase:
    return case if DEVICE == "cuda" else case.tiny()


def _measure_head(case: HeadCase, rounds: Rounds) -> list[Measurement]:
    """Return error and time of each kernel; a kernel that fails leaves the others their turn."""
    workload = case.build()
    exact = workload.exact()["output"]
    measurement = _measurement(case, "head")
    found, runs = [], {}
    for kernel in KERNELS:
        run = partial(run_head, kernel, *workload.arguments, **workload.options)
        try:
            with torch.no_grad():
                error = relative_error(run(), exact)
        except (RuntimeError, NotImplementedError) as reason:
            print(f"without {kernel}: {str(reason).splitlines()[0]}", flush=True)
            continue
        limit = 4 * torch.finfo(case.dtype).eps
        found.append(
            measurement(contender=kernel, quantity="relative error", value=error, at_most=limit)
        )
        if error <= limit:
            runs[kernel] = run
    return found + _times(runs, workload, rounds, measurement)


def _measure_op(case: Case, rounds: Rounds) -> list[Measurement]:
    workload = case.build()
    outcome = check(case, workload)
    measurement = _measurement(case, case.op)
    error = measurement(**outcome.as_error())
    if not outcome.is_correct:
        return [error]

    def run() -> object:
        workload.clear_gradients()
        return workload.run_in_mode(type(case).ours, case.direction)

    return [error, *_times({"ours": run}, workload, rounds, measurement, case.direction)]


def _measurement(case: Case, part: str) -> Callable[..., Measurement]:
    return partial(
        Measurement,
        study="gpu_window",
        part=part,
        subject=f"{case.direction} {case.shape} {case.layout}",
        dtype=case.dtype_name,
        device=DEVICE,
    )


def _times(
    runs: Mapping[str, Callable[[], object]],
    workload: Workload,
    rounds: Rounds,
    measurement: Callable[..., Measurement],
    direction: str = "forward",
) -> list[Measurement]:
    with torch.set_grad_enabled(direction != "forward"):
        replays = {name: captured(run) for name, run in runs.items()}
        notes = {name: note for name, (_, note) in replays.items()}
        contenders = {name: Contender(run) for name, (run, _) in replays.items()}
        if workload.floors:
            notes[FLOOR] = fastest(workload.floors, rounds.seconds, DEVICE)
            contenders[FLOOR] = Contender(captured(workload.floors[notes[FLOOR]])[0])
        times = time_in_turns(contenders, rounds, DEVICE)
    return [
        measurement(
            contender=name,
            quantity=TIME,
            value=statistics.median(values),
            unit="ms",
            rounds=len(values),
            note=notes[name],
        )
        for name, values in times.items()
    ]


def captured(run: Callable[[], Any]) -> tuple[Callable[[], object], str]:
    """Return a function that replays the kernels of `run`, and how it does so.

    On the CPU, and where the capture fails, the function is `run` itself.
    """
    if DEVICE == "cpu":
        return run, ""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, f"not captured: {str(error).splitlines()[0]}"
    return graph.replay, "graph"
