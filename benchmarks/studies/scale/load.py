"""Loading an index folder: its vectors stay in their file, its ids are read into memory."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.memory import resident_bytes, return_freed_memory
from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.studies.scale.search import SYNTHETIC
from benchmarks.studies.scale.work import Work, Works, WrongError, measure_time, mebibytes
from splade_fast.search.index import Index, IndexMeta

DOCUMENTS = (62_500, 125_000, 250_000, 500_000, 1_000_000)
LOADING, KEPT = "Index.load", "private memory"

_ENTRIES = 8  # of a row: memory does not depend on it


@dataclass(frozen=True)
class LoadWork(Work):
    path: Path
    documents: int

    def measure(self, rounds: Rounds) -> list[Measurement]:
        Index.load(self.path)  # libraries do not count
        return_freed_memory()
        before = resident_bytes("RssAnon")  # without the pages of mapped files
        index = Index.load(self.path)
        return_freed_memory()
        kept = resident_bytes("RssAnon") - before
        if index.ids[-1] != str(self.documents - 1):
            raise WrongError(f"the last of {self.documents} ids is {index.ids[-1]}")
        return [measure_time(lambda: Index.load(self.path), rounds), mebibytes(KEPT, max(0, kept))]


def load_documents(documents: int, folder: Path) -> Works:
    rows = SYNTHETIC.rows(documents, _ENTRIES, 1)
    path = folder / "index"
    ids = [str(number) for number in range(documents)]
    Index(rows, ids, IndexMeta("none", 256, _ENTRIES)).save(path)
    return [(LOADING, LoadWork(path, documents))]
