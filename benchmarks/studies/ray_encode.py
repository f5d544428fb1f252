"""Encoding by workers of Ray, in turns with the plain process.

Each encodes the same docstrings with the demo's checkpoint, in chunks of 100, with as many threads
as torch has here. "documents/s" counts from the time at which all workers have finished their first
chunk. "start" is what passes before they begin it; "Ray" is the start of Ray itself, once. The CPUs
of Ray are those that two workers need.

"parquet" is the whole of `encode_corpus` straight to Parquet files, which the workers write.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import MINIMUM_ROUNDS, Rounds
from benchmarks.inputs.trained_states import fetched
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import docstring_pairs, spread
from splade_fast import SpladeEncoder, encode_corpus
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.search.pieces import Piece, PieceEncoder, list_pieces
from splade_fast.search.ray_engine import RayEngine
from splade_fast.search.work import Engine, working

_DOCUMENTS, _CHUNK = 1600, 100
_BATCH, _MAX_LENGTH = 32, 256
_WORKERS = 2


@dataclass(frozen=True)
class Contender:
    """An engine and the number of its workers."""

    engine: Engine
    workers: int


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {"encode": partial(_encode, rounds), "parquet": partial(_write_parquet, rounds)}


def _encode(rounds: Rounds) -> list[Measurement]:
    encoder = SpladeEncoder.from_pretrained(fetched(DEMO))
    with _corpus() as corpus, _ray() as started:
        return [
            _measurement("encode", "Ray", "start", started, "s"),
            *compare(encoder, corpus, _contenders(), rounds),
        ]


def _write_parquet(rounds: Rounds) -> list[Measurement]:
    encoder = SpladeEncoder.from_pretrained(fetched(DEMO))
    with _corpus() as corpus, _ray():
        return compare_parquet(encoder, corpus, _contenders(), rounds)


def _contenders() -> dict[str, Contender]:
    threads = torch.get_num_threads()
    engines = {
        f"Ray, workers: {count}": Contender(RayEngine(workers=count, threads=threads), count)
        for count in range(1, _WORKERS + 1)
    }
    return {"process": Contender("process", 1), **engines}


def compare(
    encoder: TextEncoder, corpus: Path, contenders: Mapping[str, Contender], rounds: Rounds
) -> list[Measurement]:
    """Measure start and rate of each contender; the vectors return to this process."""
    pieces, _ = list_pieces(corpus, _CHUNK)
    work = PieceEncoder(encoder, None, _BATCH, _MAX_LENGTH)
    work.encode(pieces[0], lambda count: None)  # libraries and kernels do not count
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for name in _turns(list(contenders), rounds):
        chosen = contenders[name]
        times = _finishing_times(work, pieces, chosen.engine)
        found[name].append(_start_and_rate(times, pieces, chosen.workers))
    return [
        row
        for name, runs in found.items()
        for row in (
            _median("encode", name, "start", [start for start, _ in runs], "s"),
            _median("encode", name, "documents/s", [rate for _, rate in runs], "1/s"),
        )
    ]


def compare_parquet(
    encoder: TextEncoder, corpus: Path, contenders: Mapping[str, Contender], rounds: Rounds
) -> list[Measurement]:
    """Measure whole calls of `encode_corpus` to Parquet files."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn, name in enumerate(_turns(list(contenders), rounds)):
        start = time.perf_counter()
        encode_corpus(
            encoder,
            corpus,
            corpus.with_name(f"parquet {turn}"),
            model="demo",
            batch_size=_BATCH,
            max_length=_MAX_LENGTH,
            chunk_size=_CHUNK,
            show_progress=False,
            engine=contenders[name].engine,
            file_format="parquet",
        )
        found[name].append(time.perf_counter() - start)
    return [_median("parquet", name, "whole call", runs, "s") for name, runs in found.items()]


def _turns(names: Sequence[str], rounds: Rounds) -> Iterator[str]:
    """Yield each name once a round, beginning with another one in each."""
    started = time.perf_counter()
    for turn in range(max(rounds.rounds, MINIMUM_ROUNDS)):
        if turn >= MINIMUM_ROUNDS and time.perf_counter() - started > rounds.seconds:
            return
        first = turn % len(names)
        yield from [*names[first:], *names[:first]]


def _finishing_times(work: PieceEncoder, pieces: Sequence[Piece], engine: Engine) -> list[float]:
    """Return the seconds after which each chunk was here."""
    start = time.perf_counter()
    with working(engine, work.encode, pieces, show_progress=False) as results:
        return [time.perf_counter() - start for _ in results]


def _start_and_rate(
    times: Sequence[float], pieces: Sequence[Piece], workers: int
) -> tuple[float, float]:
    """Return the seconds before the first chunks were begun, and documents a second after them."""
    first = times[workers - 1]
    size = sum(piece.count for piece in pieces) / len(pieces)
    rate = size * (len(times) - workers) / (times[-1] - first)
    return first - workers * size / rate, rate


@contextmanager
def _corpus() -> Iterator[Path]:
    texts = spread([pair.document for pair in docstring_pairs()], _DOCUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.tsv"
        lines = (f"d{number}\t{' '.join(text.split())}\n" for number, text in enumerate(texts))
        path.write_text("".join(lines), encoding="utf-8")
        yield path


@contextmanager
def _ray() -> Iterator[float]:
    """Start Ray for the block, and give it the seconds that the start took."""
    try:
        import ray
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    start = time.perf_counter()
    cpus = _WORKERS * torch.get_num_threads()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield time.perf_counter() - start
    finally:
        ray.shutdown()


def _median(
    part: str, contender: str, quantity: str, values: Sequence[float], unit: str
) -> Measurement:
    median = statistics.median(values)
    return _measurement(part, contender, quantity, median, unit, rounds=len(values))


def _measurement(
    part: str, contender: str, quantity: str, value: float, unit: str, rounds: int = 1
) -> Measurement:
    return Measurement(
        study="ray_encode",
        part=part,
        subject=f"{_DOCUMENTS} docstrings",
        contender=contender,
        quantity=quantity,
        value=value,
        unit=unit,
        rounds=rounds,
    )
