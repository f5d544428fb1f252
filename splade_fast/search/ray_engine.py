"""RayEngine: work on the pieces of a corpus by the workers of a Ray cluster, through Ray Data."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from splade_fast._checks import check_count

_MOST_RETRIES = 3  # of an item whose worker dies
_MOST_FAILURES = 10  # items, before the others are given up


class Item(Protocol):
    """Texts or documents that are worked on together."""

    @property
    def number(self) -> int:
        """Number of the item, which no other has."""
        ...

    @property
    def count(self) -> int:
        """Number of texts."""
        ...

    def describe(self) -> str:
        """Return where the item comes from."""
        ...


I = TypeVar("I", bound=Item)  # noqa: E741
R = TypeVar("R")
# Function of an item, and of a function that it calls with the numbers of texts that are done.
Work = Callable[[I, Callable[[int], object]], R]


class EngineError(RuntimeError):
    """Error of the engine that runs the workers, or of a worker that died again and again."""


@dataclass(frozen=True)
class RayEngine:
    """Workers on a Ray cluster, or on this machine alone.

    A worker loads the encoder once. It reads the texts of a chunk from the corpus, so each machine
    needs the corpus under the same path or URL, and splade_fast. The vectors return to the process
    that calls, which alone writes files. A chunk whose worker or machine is lost goes to another
    worker, four times at most. A document that cannot be encoded holds up no other chunk: the error
    that names it is raised once the others are finished, or ten chunks have failed.

    Args:
        address: address of a cluster, such as "auto", "HOST:PORT" or "ray://HOST:PORT". By default
            the cluster to which this process is connected or that RAY_ADDRESS names, else one that
            the call starts on this machine and ends.
        workers: number of workers; by default one for each GPU of the cluster, or as many as its
            CPUs allow.
        threads: number of threads of a worker, and of CPUs that it occupies; by default as many as
            torch uses in this process, or 1 on GPUs.
        device: device of the workers, "cpu" or "cuda"; by default that of the encoder.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range.

    Example::

        >>> from splade_fast.search.ray_engine import RayEngine
        >>> engine = RayEngine(workers=8, threads=4)  # for sf.encode_corpus(..., engine=engine)
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    device: Literal["cpu", "cuda"] | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name), 1))
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device must be 'cpu', 'cuda' or None, got {self.device!r}")

    def run(
        self,
        work: Work[I, R],
        items: Sequence[I],
        after_texts: Callable[[int], object],
        device: str = "cpu",
    ) -> Generator[tuple[I, R]]:
        """Yield each item and the result of its work, in the order in which they are finished.

        Args:
            work: function, or method of an object, that is sent to the workers.
            items: the items.
            after_texts: function that is called after each item with its number of texts.
            device: device of the workers, unless the engine names one.

        Raises:
            Exception: an error of `work`; raised at the end.
            EngineError: Ray failed, or workers died at an item.
            ImportError: ray is not installed.
            ValueError: the cluster has no room for a worker.
        """
        if not items:
            return
        left = {item.number: item for item in items}
        failures: list[Exception] = []
        with (
            _session(self.address),
            closing(self._results(work, items, self.device or device)) as results,
        ):
            for number, result in results:
                item = left.pop(number)
                if isinstance(result, Exception):
                    failures.append(result)
                else:
                    after_texts(item.count)
                    yield item, result
                if len(failures) == _MOST_FAILURES:
                    raise _join_failures(failures)
        if failures:
            raise _join_failures(failures)
        if left:
            item = next(iter(left.values()))
            raise EngineError(f"workers died {_MOST_RETRIES + 1} times at {item.describe()}")

    def _results(
        self, work: Work[I, R], items: Sequence[I], device: str
    ) -> Generator[tuple[int, R | Exception]]:
        """Yield the number of each item with the result of its work, or with the error."""
        import ray
        from ray.exceptions import RayError

        threads = self.threads or (1 if device == "cuda" else torch.get_num_threads())
        workers = self.workers or _count_places(ray.nodes(), device, threads)
        with _quiet_data() as data:
            dataset = data.from_items(
                [{"item": pickle.dumps(item)} for item in items],
                override_num_blocks=len(items),
            ).map_batches(
                _Worker,
                fn_constructor_args=[ray.put(_store(work)), device, threads],
                batch_size=1,
                batch_format="pyarrow",
                # An item that kills its worker would take others that wait there along.
                compute=data.ActorPoolStrategy(
                    size=min(workers, len(items)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=threads,
                num_gpus=1 if device == "cuda" else None,
                max_restarts=-1,
                max_task_retries=_MOST_RETRIES,
            )
            try:
                for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                    for row in table.to_pylist():
                        yield row["number"], pickle.loads(row["result"])
            except RayError as error:
                raise EngineError(f"Ray failed: {error}") from error


class _Worker:
    """Actor of Ray that works on items."""

    def __init__(self, stored: Any, device: str, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        content = io.BytesIO(ray.get(stored))
        # No file of others, but the caller's own object.
        self._work: Work[Any, Any] = torch.load(content, map_location=device, weights_only=False)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        (stored,) = batch["item"]
        item = pickle.loads(stored.as_py())
        try:
            result = pickle.dumps(self._work(item, lambda count: None))
        except Exception as error:
            result = _pickle_error(error)
        column = pa.array([result], pa.large_binary())  # vectors may have more than 2 GiB
        return pa.table({"number": [item.number], "result": column})


@contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Connect to Ray inside the block, unless the process is connected."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"engine 'ray' needs Ray: pip install 'splade_fast[ray]' ({error})"
        ) from error
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise EngineError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet_data() -> Iterator[Any]:
    """Yield ray.data, which reports no progress and whose datasets outlive a lost piece.

    Datasets keep the settings that they are made with.
    """
    from ray import data

    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_errored_blocks": _MOST_FAILURES,
    }
    before, level = {name: getattr(context, name) for name in settings}, logger.level
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Ray 2.60 warns of options of actors, and has no others for their retries.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            yield data
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _count_places(nodes: Sequence[dict[str, Any]], device: str, threads: int) -> int:
    """Return the number of workers that the machines of a cluster have room for.

    Raises:
        ValueError: they have no room for any.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if device == "cuda":
        count = sum(int(machine.get("GPU", 0)) for machine in machines)
        if not count:
            raise ValueError("device must be 'cpu' on a cluster without GPUs, got 'cuda'")
        return count
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    count = sum(number // threads for number in cpus)
    if not count:
        raise ValueError(
            f"threads must be at most the number of CPUs of a machine, {max(cpus, default=0)}, "
            f"got {threads}"
        )
    return count


def _store(work: Work[I, R]) -> bytes:
    """Return the bytes of a work, with the weights of its encoder in CPU memory once each."""
    from ray import cloudpickle

    buffer = io.BytesIO()
    torch.save(work, buffer, pickle_module=cloudpickle)
    return buffer.getvalue()


def _pickle_error(error: Exception) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # an error class may take other arguments than it keeps
        return pickle.dumps(EngineError(f"{type(error).__name__}: {error}"))
    return content


def _join_failures(failures: Sequence[Exception]) -> Exception:
    """Return the first error; its cause tells of the others."""
    first, *others = failures
    if others:
        first.__cause__ = EngineError("; ".join(str(error) for error in others))
    return first
