"""Really encoded passages of documentation, and titles of sections as queries."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.inputs.documentation import (
    PACKAGES,
    DocumentationError,
    download,
    passages_and_titles,
    shuffled,
)
from examples.docstrings.checkpoint import DEMO
from splade_fast import SparseRows, SpladeEncoder, encode_corpus
from splade_fast._atomic_files import whole_file
from splade_fast.search.index import Index

DOCUMENTS, QUERIES = 500_000, 1000
_MAX_LENGTH = 128


def encoded_folder(cache: Path | None = None) -> Path:
    """Return the folder of the texts and their vectors."""
    settings = f"{DEMO.requirement} {PACKAGES} {DOCUMENTS} {QUERIES} {_MAX_LENGTH}"
    name = f"documentation-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    return (cache or Path.home() / ".cache" / "splade_fast") / name


def encoded_documentation(cache: Path | None = None) -> tuple[SparseRows, SparseRows]:
    """Return 1,000 encoded queries and 500,000 encoded passages with all their entries, mapped.

    The first call downloads about 0.5 GB of packages and encodes the passages, which takes half an
    hour of one core. A call that was interrupted goes on. The texts and vectors stay in the cache.

    Raises:
        CheckpointError: the demo's checkpoint cannot be fetched.
        DocumentationError: the machine has no packages of Debian, or too little text.
    """
    folder = encoded_folder(cache)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"passages": DOCUMENTS, "titles": QUERIES}
    if not all((folder / f"{name}.tsv").exists() for name in texts):
        found = passages_and_titles(download(folder.parent / "packages"))
        for (name, count), lines in zip(texts.items(), found, strict=True):
            if len(lines) < count:
                raise DocumentationError(f"{name} must be at least {count}, got {len(lines)}")
            _write_texts(folder / f"{name}.tsv", shuffled(lines, count))
    for name in texts:
        if not (folder / name).exists():
            encode_corpus(
                _encoder(),
                folder / f"{name}.tsv",
                folder / name,
                model=DEMO.fetch(),
                max_length=_MAX_LENGTH,
                resume=True,
            )
    queries, passages = (
        Index.load(folder / name, should_check=False).rows for name in ("titles", "passages")
    )
    return queries[queries.lengths > 0], passages


@functools.cache
def _encoder() -> SpladeEncoder:
    return SpladeEncoder.from_pretrained(str(DEMO.fetch()))


def _write_texts(path: Path, lines: Sequence[str]) -> None:
    with whole_file(path) as temporary:
        content = "".join(f"{number}\t{line}\n" for number, line in enumerate(lines))
        temporary.write_text(content, encoding="utf-8")
