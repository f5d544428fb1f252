"""Speed and peak memory of one contender, measured in a process of its own.

The peak is counted above the memory of the loaded and warmed-up model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness.memory import has_peak_memory, peak_growth
from examples.docstrings.contenders import as_sparse_rows, load_contender
from splade_fast.ops.sparse_rows import SparseRows


@dataclass
class Measurement:
    """Result of one contender; `peak_mib` is None where the system does not report memory."""

    docs_per_second: float
    peak_mib: float | None


def measure_in_subprocess(
    contender: str,
    model: str,
    texts: list[str],
    folder: Path,
    *,
    batch_size: int,
    max_length: int,
    threads: int,
) -> tuple[Measurement, SparseRows]:
    """Encode texts with one contender in a new process, and measure it.

    Args:
        contender: a key of `CONTENDERS`.
        model: name or folder of the checkpoint.
        texts: sorted by length.
        folder: an empty folder for the files that the two processes exchange.
        batch_size: number of texts encoded at a time.
        max_length: number of tokens to which texts are truncated.
        threads: number of threads of torch.

    Returns:
        The measurement and the vectors of the texts.

    Raises:
        RuntimeError: the process failed; the message contains its stderr.
    """
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    sizes = {"batch-size": batch_size, "max-length": max_length, "threads": threads}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", __spec__.name, contender, model, str(folder), *options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{contender} failed:\n{finished.stderr}")
    measurement = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    return Measurement(**measurement), SparseRows.load(folder / "vectors.safetensors")


def measure(
    contender: str,
    model: str,
    folder: Path,
    batch_size: Annotated[int, typer.Option()],
    max_length: Annotated[int, typer.Option()],
    threads: Annotated[int, typer.Option()],
) -> None:
    """Encode folder/texts.json, and write measurement.json and vectors.safetensors beside it."""
    torch.set_num_threads(threads)
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    encode = load_contender(contender, model, max_length)
    encode(["warm up"], batch_size)
    vectors, seconds = [], []

    def run() -> None:
        start = time.perf_counter()
        vectors.append(encode(texts, batch_size))
        seconds.append(time.perf_counter() - start)

    if has_peak_memory():
        peak_mib = peak_growth(run) / 2**20
    else:
        run()
        peak_mib = None
    as_sparse_rows(vectors[0]).save(folder / "vectors.safetensors")
    result = asdict(Measurement(len(texts) / seconds[0], peak_mib))
    (folder / "measurement.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    typer.run(measure)
