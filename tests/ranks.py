"""Function runner for several processes in a gloo group, with a time limit."""

import gc
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from tests.new_process import fork_server

_POLL_SECONDS = 0.05


def run_ranks(
    count: int, function: Callable[..., None], folder: Path, *arguments: Any, seconds: float = 120
) -> None:
    """Run function(rank, count, *arguments) in `count` processes.

    Raises:
        AssertionError: a process failed, with the traceback of the first failure, or the processes
            took longer than `seconds`. All processes have ended then.
    """
    context = fork_server()
    failures = context.Queue()
    processes = [
        context.Process(
            target=_run, args=(rank, count, str(folder), seconds, failures, function, arguments)
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in processes):
            failed = [p for p in processes if p.exitcode not in (None, 0)]
            if failed:
                raise AssertionError(_first_failure(failures) or f"a process ended: {failed}")
            assert time.monotonic() < deadline, f"the ranks took longer than {seconds} s"
            time.sleep(_POLL_SECONDS)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, _first_failure(failures) or codes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _first_failure(failures: Any) -> str | None:
    try:
        return str(failures.get(timeout=1))
    except Empty:
        return None


def _run(
    rank: int,
    count: int,
    folder: str,
    seconds: float,
    failures: Any,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        gc.freeze()  # accelerate collects garbage at each training
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=seconds),
        )
        function(rank, count, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        failures.close()
        failures.join_thread()
        os._exit(1)
