"""Passages of the documentation packages of Debian, and titles of their sections as queries.

The packages are downloaded with `apt-get download`, and their pages are read from them without an
installation. A passage is a run of neighbouring blocks of text (paragraphs, items, cells) of one
section. No passage and no title appears twice, so that the frames of generated pages count once.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

PACKAGES = (
    "cmake-doc",
    "cppreference-doc-en-html",
    "erlang-doc",
    "fp-docs-3.2.2",
    "ghc-doc",
    "git-doc",
    "gimp-help-en",
    "libboost1.74-doc",
    "libglib2.0-doc",
    "libgtk-3-doc",
    "linux-doc-6.1",
    "llvm-14-doc",
    "maxima-doc",
    "octave-doc",
    "openjdk-17-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python-pandas-doc",
    "python-scipy-doc",
    "python-sklearn-doc",
    "python-sympy-doc",
    "python3.11-doc",
    "qtbase5-doc-html",
    "racket-doc",
    "rust-doc",
    "sagemath-doc",
    "scala-doc",
)
_PAGE = re.compile(r"\.x?html?(\.gz)?$")
_MAX_PAGE_BYTES = 4_000_000
_MIN_WORDS, _FULL_WORDS, _MAX_WORDS = 16, 50, 100  # of a passage
_MIN_TITLE_WORDS, _MAX_TITLE_WORDS = 2, 12

_HIDDEN = re.compile(r"<(script|style|head|nav|svg|footer)\b.*?</\1\s*>|<!--.*?-->", re.S | re.I)
_TITLE = re.compile(r"<h([1-6])\b[^>]*>(.*?)</h\1\s*>", re.S | re.I)
_BLOCK_END = re.compile(
    r"</?(?:p|div|li|dt|dd|tr|td|th|pre|table|ul|ol|dl|br|section)\b[^>]*>", re.I
)
_TAG = re.compile(r"<[^>]*>")
_NUMBERING = re.compile(r"^[\dA-Z]?[\d.]*\s+|[¶§#🔗]+\s*$")


class DocumentationError(RuntimeError):
    """Error of a machine without Debian's packages."""


def download(folder: Path) -> list[Path]:
    """Return the files of the packages, of which missing ones are downloaded."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DocumentationError("the documentation needs apt-get and dpkg-deb")
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            command = ["apt-get", "--quiet", "download", package]
            finished = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False
            )
            if finished.returncode != 0:
                raise DocumentationError(f"apt-get could not download {package}: {finished.stderr}")
    return [next(iter(sorted(folder.glob(f"{package}_*.deb")))) for package in PACKAGES]


def passages_and_titles(packages: list[Path]) -> tuple[list[str], list[str]]:
    """Return all different passages in their order, and all different titles, both by package."""
    seen: set[bytes] = set()
    passages: list[str] = []
    titles: dict[str, None] = {}
    for package in packages:
        for page in _pages(package):
            for title, blocks in _sections(page):
                found = [text for text in _join_blocks(blocks) if _is_new(text, seen)]
                passages += found
                if found and _MIN_TITLE_WORDS <= len(title.split()) <= _MAX_TITLE_WORDS:
                    titles.setdefault(title)
    return passages, list(titles)


def shuffled(texts: list[str], count: int) -> list[str]:
    """Return `count` of the texts in a random order, the same at each call."""
    return random.Random(0).sample(texts, min(count, len(texts)))


def _pages(package: Path) -> Iterator[str]:
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and _PAGE.search(member.name) and member.size < _MAX_PAGE_BYTES:
                file = archive.extractfile(member)
                assert file is not None
                content = file.read()
                if member.name.endswith(".gz"):
                    content = gzip.decompress(content)
                yield content.decode("utf-8", "replace")


def _sections(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the blocks of each section; those before the first title are left out."""
    parts = _TITLE.split(_HIDDEN.sub(" ", page))
    for title, body in zip(parts[2::3], parts[3::3], strict=True):
        yield _NUMBERING.sub("", _plain(title)), [_plain(block) for block in _BLOCK_END.split(body)]


def _plain(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", markup)).split())


def _join_blocks(blocks: list[str]) -> Iterator[str]:
    """Yield texts of at least _FULL_WORDS where possible, and at most _MAX_WORDS."""
    words: list[str] = []
    for block in blocks:
        words += block.split()
        while len(words) >= _MAX_WORDS:
            yield " ".join(words[:_MAX_WORDS])
            words = words[_MAX_WORDS:]
        if len(words) >= _FULL_WORDS:
            yield " ".join(words)
            words = []
    if len(words) >= _MIN_WORDS:
        yield " ".join(words)


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new
