"""Folder of files that each hold some of the rows of a target, and their writer."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import finish_files, flush_folder, name_in_errors, whole_file
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.work_folder import WorkFolder

_DIGITS = 6


@dataclass(frozen=True)
class Part:
    """Finished files of consecutive rows.

    Args:
        documents: number of documents in them.
        files: size of each file by its name.
    """

    documents: int
    files: Mapping[str, int]


class PartFolder(WorkFolder):
    """Folder beside a target whose files are written part by part, by any number of processes.

    Beside the files it holds a note on each finished part.
    """

    verb = "export"

    @property
    def parts(self) -> Path:
        """Folder of the files, which becomes the target."""
        return self.path / "parts"

    def note(self, number: int) -> Path:
        """Return the file that says what a part consists of."""
        return self.path / f"{number}.json"

    def claim(self, settings: dict[str, Any], *, should_keep: bool) -> None:
        """Store or compare the settings of all parts; see `WorkFolder.claim`."""
        super().claim(settings, should_keep=should_keep)
        self.parts.mkdir(exist_ok=True)

    def find_finished(self, count: int) -> list[Part | None]:
        """Return each of `count` parts whose files all have the sizes that its note says."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.parts)}
        parts = [_read_note(self.note(number)) for number in range(count)]
        return [
            part if part is not None and part.files.items() <= sizes.items() else None
            for part in parts
        ]

    def check(self, count: int) -> list[Part]:
        """Return all parts.

        Raises:
            OSError: a part is missing.
        """
        parts = []
        for number, part in enumerate(self.find_finished(count)):
            if part is None:
                raise OSError(
                    f"{self.parts} must keep what was written there until the end, and be on a "
                    f"file system that all machines share, got no part {number}"
                )
            parts.append(part)
        return parts

    def finish(self, target: Path) -> None:
        """Rename the folder of the files to `target`, and remove this one."""
        self.rename(self.parts, target)


@dataclass
class PartWriter:
    """Writer of parts, which other processes may run.

    Args:
        folder: folder of the parts.
        write: function of rows, the folder to write, ids, `show_progress` and options. It returns
            the number of documents that it has written.
        options: options of `write`.
        shared: names of the files that are the same for all parts. Others get the part's number.
        store_texts: function of the documents' texts that returns an option of `write`; None to
            leave texts out.
    """

    folder: PartFolder
    write: Callable[..., int]
    options: dict[str, Any] = field(default_factory=dict)
    shared: Collection[str] = ()
    store_texts: Callable[[Sequence[str]], dict[str, Any]] | None = None

    def write_part(
        self,
        number: int,
        start: int,
        rows: SparseRows,
        ids: Sequence[str],
        texts: Sequence[str] | None = None,
    ) -> Part:
        """Write the files of a part, each of which appears whole.

        Args:
            number: number of the part.
            start: number of rows in the parts before.
            rows: rows of the part.
            ids: their ids.
            texts: their texts, where `store_texts` takes them.

        Raises:
            OSError: the file system failed, or this machine does not see the folder.
            TypeError, ValueError: see the function that writes.
        """
        if not self.folder.parts.is_dir():
            raise FileNotFoundError(
                f"{self.folder.parts} must be on a file system that all machines share, got none"
            )
        options = dict(self.options)
        if self.store_texts is not None and texts is not None:
            options.update(self.store_texts(texts))
        # Each attempt has its own folder: a process that was given up may still be writing.
        with (
            name_in_errors(self.folder.parts),
            tempfile.TemporaryDirectory(
                prefix=f".{number}.", suffix=".partial", dir=self.folder.path
            ) as name,
        ):
            written = Path(name) / "part"
            try:
                documents = self.write(rows, written, ids, show_progress=False, **options)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{error}, counted from row {start} on") from error
            finish_files(written)
            part = Part(documents, self._move(written, number))
        with whole_file(self.folder.note(number)) as temporary:
            temporary.write_text(json.dumps(asdict(part)), encoding="utf-8")
        return part

    def _move(self, written: Path, number: int) -> dict[str, int]:
        """Move files to the folder of all parts, and return their sizes by their new names."""
        sizes = {}
        for file in sorted(written.iterdir()):
            name = file.name if file.name in self.shared else part_name(file.name, number)
            sizes[name] = file.stat().st_size
            os.replace(file, self.folder.parts / name)
        flush_folder(self.folder.parts)
        return sizes


def part_name(name: str, number: int) -> str:
    """Return the name of a part's file, such as bulk-000003.ndjson; parts sort by their names."""
    path = Path(name)
    return f"{path.stem}-{number:0{_DIGITS}}{path.suffix}"


def _read_note(file: Path) -> Part | None:
    try:
        part = Part(**json.loads(file.read_text(encoding="utf-8")))
        return part if isinstance(part.files, dict) else None
    except (OSError, TypeError, ValueError, RecursionError):
        return None
