"""Growth of time and memory with size: five sizes or more, and a power law through them.

Each size is measured in a process of its own.

- encode: real docstrings to an index folder, against the number of documents.
- load: an index folder opened, against the number of documents.
- search: exact search of synthetic SPLADE rows in a memory-mapped file, against their number.
- cache: a draw from the negative cache and an update of it, against its slots.
- vocabulary: the head's forward and backward, against V.
- length: the head's and the pool's forward and backward, against L.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.studies.scale import cache, encode, head, load, search
from benchmarks.studies.scale.work import Works, measure_alone


@dataclass(frozen=True)
class Part:
    axis: str
    sizes: tuple[int, ...]
    make_works: Callable[[int, Path], Works]  # takes a size, and a folder for files


PARTS = {
    "encode": Part("documents", encode.DOCUMENTS, encode.encode_documents),
    "load": Part("documents", load.DOCUMENTS, load.load_documents),
    "search": Part("documents", search.DOCUMENTS, search.search_documents),
    "cache": Part("slots", cache.SLOTS, cache.fill_slots),
    "vocabulary": Part("entries", head.VOCABULARIES, head.grow_vocabulary),
    "length": Part("tokens", head.LENGTHS, head.grow_length),
}


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        f"{name} {size}": partial(measure, name, size, rounds)
        for name, part in PARTS.items()
        for size in part.sizes
    }


def measure(name: str, size: int, rounds: Rounds) -> list[Measurement]:
    """Measure a part at one size."""
    part = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        return [
            dataclasses.replace(
                quantity,
                part=name,
                subject=subject,
                contender=work.contender,
                axis=part.axis,
                size=size,
            )
            for subject, work in part.make_works(size, Path(folder))
            for quantity in measure_alone(work, rounds)
        ]
