"""Folders of checkpoints: written whole, listed, checked and deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from splade_fast._atomic_files import finish_files, flush_folder
from splade_fast._distributed import OtherRankError, fail_together

OPTIMIZER_FILE = "optimizer.safetensors"
_MANIFEST = "checkpoint.json"
_FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|deleted)")


class CheckpointError(OSError):
    """Error of a checkpoint that cannot be written or read."""


def rank_file(rank: int, ranks: int) -> str:
    """Return the name of the file of one process."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


@contextmanager
def new_checkpoint(folder: Path, *, is_writer: bool) -> Iterator[Path]:
    """Give all processes a temporary folder, which becomes `folder` after the block.

    Args:
        folder: `checkpoint-<step>` in the output directory, on a file system that all
            processes share.
        is_writer: whether this process makes and renames the folder.

    Yields:
        The temporary folder.

    Raises:
        CheckpointError: a file could not be written, on any process; all processes raise it. The
            temporary folder is deleted, and earlier checkpoints stay as they were.
        Exception: any other error inside, on the process that has it; the others raise
            CheckpointError.
    """
    partial = _hidden_path(folder, "partial")
    try:
        with fail_together("making the folder"):
            if is_writer:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with fail_together("writing the files"):
            yield partial
        with fail_together("renaming the folder"):
            if is_writer:
                _write_manifest(partial)
                finish_files(partial)
                _rename(partial, folder)
    except Exception as error:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError | OtherRankError):
            raise
        is_elsewhere = isinstance(error, OtherRankError)
        reason = "another process could not write its part" if is_elsewhere else error
        raise CheckpointError(
            f"cannot write {folder}: {reason}; earlier checkpoints are as they were"
        ) from error


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a run, the earliest first."""
    steps = {
        int(match[1]): path
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and _find_defect(path) is None
    }
    return [steps[step] for step in sorted(steps)]


def find_last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """Return the complete checkpoint of the highest step, or None where there is none."""
    return next(reversed(find_checkpoints(output_dir)), None)


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Delete the temporary folders of a killed run, and restore a checkpoint it was replacing."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        checkpoint = path.with_name(match[1])
        if match[2] == "replaced" and not checkpoint.exists():
            path.rename(checkpoint)
        else:
            shutil.rmtree(path)


def delete_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Delete all checkpoints of a run, complete or not."""
    remove_leftovers(output_dir)
    for path in Path(output_dir).iterdir():
        if _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def delete_surplus_checkpoints(
    output_dir: str | os.PathLike[str], limit: int | None, best: str | None
) -> None:
    """Delete the earliest checkpoints, but never the last one or the best one.

    Args:
        output_dir: directory with the checkpoints.
        limit: number of checkpoints to keep; None or 0 keeps all.
        best: path of the best checkpoint, or None.
    """
    found = find_checkpoints(output_dir)
    if not limit or not found:
        return
    kept = {found[-1].resolve()} | ({Path(best).resolve()} if best is not None else set())
    surplus = [path for path in found if path.resolve() not in kept]
    for path in surplus[: max(0, len(found) - max(limit, len(kept)))]:
        # A killed deletion must not leave half a checkpoint under the name of a whole one.
        hidden = _hidden_path(path, "deleted")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def check_checkpoint(
    folder: str | os.PathLike[str], ranks: int, *, is_for_any_number: bool = False
) -> None:
    """Raise CheckpointError unless the folder is complete and `ranks` processes can resume it.

    Args:
        folder: the checkpoint.
        ranks: number of processes of the run that resumes it.
        is_for_any_number: whether the number of processes that wrote it may be another one.
    """
    path = Path(folder)
    if (defect := _find_defect(path)) is not None:
        raise CheckpointError(f"cannot read the checkpoint {path}: {defect}")
    if not (path / OPTIMIZER_FILE).is_file():
        raise CheckpointError(f"{path} must hold the state of a training run, got the model alone")
    written = count_writers(path)
    if written == 0 or (written != ranks and not is_for_any_number):
        raise CheckpointError(
            f"the checkpoint {path} must be resumed by as many processes as wrote it, "
            f"{written or 'none'}, got {ranks}"
        )


def count_writers(folder: str | os.PathLike[str]) -> int:
    """Return the number of processes that wrote a checkpoint, 0 if none wrote its state."""
    for file in Path(folder).glob("rank-*"):
        return int(file.stem.rpartition("-")[2])
    return 0


def _hidden_path(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _rename(partial: Path, folder: Path) -> None:
    replaced = _hidden_path(folder, "replaced")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format_version": _FORMAT_VERSION, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _find_defect(folder: Path) -> str | None:
    """Return why a folder is no complete checkpoint, or None if it is one."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {_MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict) or manifest.get("format_version") != _FORMAT_VERSION:
        return f"{_MANIFEST} must have format version {_FORMAT_VERSION}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return f"{_MANIFEST} is damaged (it lists no files)"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} must have {size} bytes, got {path.stat().st_size}"
    return None
