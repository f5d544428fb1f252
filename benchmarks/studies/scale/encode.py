"""`splade-fast encode` of real docstrings, repeated with other ids, to an index folder."""

import functools
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.checks import relative_error
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.results import EXTRA_MEMORY, TIME, Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.inputs.trained_states import fetched
from benchmarks.studies.scale.work import Work, Works, WrongError, mebibytes, per_second, quantity
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import PACKAGES, docstring_pairs
from splade_fast import SpladeEncoder, cli
from splade_fast.search.index import Index

DOCUMENTS = (12_500, 25_000, 50_000, 100_000, 200_000)
COMMAND, INDEX = "splade-fast encode", "index on disk"

_WARM_UP = 64  # documents
_CHECKED = 32
# Rounding depends on the other texts of a batch, and the last of the k entries may be another of
# those that are nearly as large.
_ALLOWED_ERROR = 0.01


@dataclass(frozen=True)
class EncodeWork(Work):
    """One run, which takes as long as many rounds of anything else."""

    model: str
    corpus: Path
    documents: int
    k: int = 128
    batch_size: int = 32
    max_length: int = 64

    def measure(self, rounds: Rounds) -> list[Measurement]:
        few, index = self.corpus.with_name("few.tsv"), _index_path(self.corpus)
        with self.corpus.open(encoding="utf-8") as lines:
            few.write_text("".join(islice(lines, _WARM_UP)), encoding="utf-8")
        self._encode(few, _index_path(few))  # libraries and threads do not count
        start = time.perf_counter()
        peak = peak_growth(lambda: self._encode(self.corpus, index))
        took = quantity(quantity=TIME, value=(time.perf_counter() - start) * 1e3, unit="ms")
        self._check(Index.load(index))
        return [
            took,
            per_second("documents/s", self.documents, took),
            mebibytes(EXTRA_MEMORY, peak),
            mebibytes(INDEX, sum(file.stat().st_size for file in index.iterdir())),
        ]

    def _encode(self, corpus: Path, index: Path) -> None:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            cli.encode(str(corpus), index, self.model, self.k, self.batch_size, self.max_length)

    def _check(self, index: Index) -> None:
        """Compare some documents from all parts of the index with encoding them alone."""
        if len(index.ids) != self.documents:
            raise WrongError(f"the index has {len(index.ids)} documents, not {self.documents}")
        chosen = torch.linspace(0, self.documents - 1, _CHECKED).long()
        wanted = set(chosen.tolist())
        with self.corpus.open(encoding="utf-8") as lines:
            texts = {
                n: line.rstrip("\n").split("\t") for n, line in enumerate(lines) if n in wanted
            }
        encoder = SpladeEncoder.from_pretrained(self.model)
        expected = encoder.encode(
            [texts[n][1] for n in chosen.tolist()],
            k=self.k,
            max_length=self.max_length,
            show_progress=False,
        )
        error = relative_error(index.rows[chosen].to_dense(), expected.to_dense().double())
        if error > _ALLOWED_ERROR or any(index.ids[n] != texts[n][0] for n in wanted):
            raise WrongError(f"index of {self.documents} documents: error {error:.2e}")


def _index_path(corpus: Path) -> Path:
    return corpus.with_suffix(".index")


@functools.lru_cache(maxsize=1)
def _texts() -> list[str]:
    documents = [pair.document for pair in docstring_pairs()]
    if not documents:
        raise UnavailableError(f"one of {', '.join(PACKAGES)} must be installed, got none")
    return documents


def encode_documents(documents: int, folder: Path) -> Works:
    corpus = folder / "corpus.tsv"
    with corpus.open("w", encoding="utf-8") as file:
        for number, text in enumerate(islice(cycle(_texts()), documents)):
            file.write(f"{number}\t{text}\n")
    return [(COMMAND, EncodeWork(str(fetched(DEMO)), corpus, documents))]
