"""PartFiles: finished parts of a file of JSON lines, which an interrupted run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import partial_folder, remove_folder, whole_file
from splade_fast.search.claim_folder import claim_folder


class PartFiles:
    """Folder beside a file, with the numbered parts of the file that are finished.

    The first line of a part holds notes about it, which the file leaves out.

    Args:
        path: the file; must not exist.

    Raises:
        FileExistsError: the file exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Path(path)
        if self.file.exists():
            raise FileExistsError(f"{path} must not exist yet")
        self.path = partial_folder(path)

    @contextmanager
    def claim(self, settings: dict[str, Any], *, resume: bool, verb: str) -> Iterator[None]:
        """Make the folder for the block, and remove it on an error unless it holds finished work.

        Args:
            settings: values of JSON that all parts depend on, by name.
            resume: whether to go on with the parts of an earlier run.
            verb: name of the work, for a message.

        Raises:
            DataError: the parts of the earlier run have other settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        claim_folder(self.path, settings, should_keep=resume, verb=verb)
        try:
            yield
        except BaseException:
            if not self.has_finished():
                remove_folder(self.path)
            raise

    def has_finished(self) -> bool:
        """Return whether the folder holds work that a run can go on with."""
        is_any_part = any(path.stem.isdecimal() for path in self.path.glob("*.jsonl"))
        return is_any_part or self.index.exists() or partial_folder(self.index).exists()

    @property
    def index(self) -> Path:
        """Folder of an index that the parts need."""
        return self.path / "index"

    def read_notes(self, number: int) -> dict[str, Any] | None:
        """Return the notes of a part; None if it is not finished."""
        try:
            with self._part(number).open(encoding="utf-8") as file:
                notes: dict[str, Any] = json.loads(file.readline())
                return notes
        except FileNotFoundError:
            return None

    def write(self, number: int, notes: Mapping[str, Any], rows: Iterable[Any]) -> None:
        """Write a part: its notes and its rows, a line of JSON each."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in (notes, *rows))
        with whole_file(self._part(number)) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def join(self, count: int) -> None:
        """Write the file from its first `count` parts, and remove the folder."""
        with whole_file(self.file) as temporary, temporary.open("wb") as target:
            for number in range(count):
                with self._part(number).open("rb") as part:
                    part.readline()
                    shutil.copyfileobj(part, target)
        remove_folder(self.path)

    def _part(self, number: int) -> Path:
        return self.path / f"{number}.jsonl"
