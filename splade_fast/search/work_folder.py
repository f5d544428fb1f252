"""WorkFolder: folder beside a target that keeps what an interrupted run has finished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from splade_fast._atomic_files import flush_folder, partial_folder, remove_folder
from splade_fast.search.claim_folder import claim_folder

INDEX = "index"  # folder in which the parts of an index are joined
F = TypeVar("F", bound="WorkFolder")


@dataclass
class WorkFolder:
    """Folder beside a target that does not exist yet.

    It holds what is finished of the work for the target, the settings of the work, and a folder
    that becomes the target.
    """

    path: Path
    verb: ClassVar[str]  # name of the work, for messages

    @classmethod
    def beside(cls: type[F], target: str | os.PathLike[str]) -> F:
        """Return the folder of a target that does not exist yet."""
        return cls(partial_folder(target))

    @contextmanager
    def make(self) -> Iterator[None]:
        """Make the folder for the block, and remove it on an error unless a part is finished."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.glob(".*.partial"):
                if unfinished.is_dir():
                    remove_folder(unfinished)
                else:
                    unfinished.unlink()
            yield
        except BaseException:
            if not self.has_finished():
                remove_folder(self.path)
            raise

    def claim(self, settings: dict[str, Any], *, should_keep: bool) -> None:
        """Store the settings of all parts, or compare them with those of the parts that exist.

        Args:
            settings: values of JSON by the name that a message gives them.
            should_keep: whether to keep the parts that an earlier run has left.

        Raises:
            DataError: a part was made with other settings, or the file of settings is damaged.
        """
        claim_folder(self.path, settings, should_keep=should_keep, verb=self.verb)

    def has_finished(self) -> bool:
        """Return whether the folder holds a finished part of any kind of work, joined or not."""
        is_any_part = any(path.stem.isdecimal() for path in self.path.glob("*.*"))
        return is_any_part or (self.path / INDEX).exists()

    def rename(self, folder: Path, target: Path) -> None:
        """Rename a folder in this one to `target`, and remove this one."""
        folder.rename(target)
        flush_folder(target.parent)
        remove_folder(self.path)
