"""What a corpus of 100 million documents would need on 8 GPUs, computed from the measured numbers.

Bytes, and times of this CPU, are the measured ones extended along straight lines. Nothing is
measured of a GPU: its published memory says what fits, and its published bandwidth how long one
read of its share takes at least, a floor that no kernel here is claimed to reach.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness.tables import markdown_table
from benchmarks.studies.scale.cache import CACHE, UPDATE_DENSE, UPDATE_SPARSE
from benchmarks.studies.scale.encode import COMMAND, INDEX
from benchmarks.studies.scale.findings import EXTRA_MEMORY, TIME, Finding
from benchmarks.studies.scale.load import KEPT, LOADING
from benchmarks.studies.scale.power_law import curves
from benchmarks.studies.scale.search import variant_of

DOCUMENTS, SLOTS, GPUS = 100_000_000, 1_048_576, 8
GPU_BYTES, GPU_BYTES_PER_SECOND = 141e9, 4.8e12  # of an H200, as published

_MIB = 2.0**20
_UNITS = {"days": 86.4e6, "hours": 3.6e6, "minutes": 6e4, "s": 1e3, "ms": 1.0}


def extended(
    findings: Sequence[Finding], study: str, variant: str, quantity: str, size: int
) -> float:
    """By least squares what a size needs: milliseconds of a time, bytes of memory.

    A line, not the power law: memory that begins large and grows slowly would seem flat for ever.

    Raises:
        KeyError: the curve was not measured.
    """
    points = curves(findings)[study, variant, quantity]
    line = np.polyfit([point.size for point in points], [point.value for point in points], 1)
    return float(np.polyval(line, size)) * (1 if quantity == TIME else _MIB)


def needs(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """What is needed, how much of it, and what that is computed from."""

    def encode(quantity: str) -> float:
        return extended(findings, "encode", COMMAND, quantity, DOCUMENTS)

    def search(queries: int) -> str:
        return _time(extended(findings, "search", variant_of(queries), TIME, DOCUMENTS))

    index, took = encode(INDEX), encode(TIME)
    ids = extended(findings, "load", LOADING, KEPT, DOCUMENTS)
    # Flat but for the ids, it varies more from run to run than they take at these sizes.
    peak = _MIB * max(f.value for f in curves(findings)["encode", COMMAND, EXTRA_MEMORY])
    shard = index / GPUS
    fitting = GPUS * GPU_BYTES / index * DOCUMENTS
    rows = [
        ("the index, k = 128 in float32, with ids", _bytes(index), "encode: index on disk"),
        (f"a shard of it on each of {GPUS} GPUs", _of_gpu(shard), f"1/{GPUS} of it"),
        (
            f"documents whose index fills {GPUS} GPUs",
            f"{fitting / 1e6:,.0f} million",
            f"{GPUS} × {GPU_BYTES / 1e9:.0f} GB",
        ),
        (
            "floor of a search that reads every row once",
            _time(shard / GPU_BYTES_PER_SECOND * 1e3),
            f"a shard at {GPU_BYTES_PER_SECOND / 1e12} TB/s",
        ),
        ("host memory of the ids of a loaded index", _bytes(ids), "load: private memory"),
        ("host memory of encoding, beside its ids", _bytes(peak), "encode: the largest"),
        ("encoding on this CPU", _time(took), "encode: time"),
        (f"encoding on {GPUS} of this CPU", _time(took / GPUS), f"1/{GPUS} of it"),
        ("searching for 1 query on this CPU, rows in memory", search(1), "search: time"),
        ("searching for 64 queries together, likewise", search(64), "search: time"),
    ]
    for name, variant in (("sparse, k = 128", UPDATE_SPARSE), ("dense, D = 768", UPDATE_DENSE)):
        cache = extended(findings, "cache", variant, CACHE, SLOTS) / GPUS
        what = f"a negative cache of {SLOTS:,} slots, {name}: a shard"
        rows.append((what, _of_gpu(cache), f"cache, 1/{GPUS} of it"))
    return rows


def section(findings: Sequence[Finding]) -> str:
    """The table of a page."""
    return markdown_table(("what", "how much", "computed from"), needs(findings))


def _bytes(count: float) -> str:
    if count >= 1e12:
        return f"{count / 1e12:.3g} TB"
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _of_gpu(count: float) -> str:
    return f"{_bytes(count)}, {count / GPU_BYTES:.2%} of {GPU_BYTES / 1e9:.0f} GB"


def _time(milliseconds: float) -> str:
    for unit, size in _UNITS.items():
        if milliseconds >= size:
            return f"{milliseconds / size:.3g} {unit}"
    return f"{milliseconds:.3g} ms"
