"""Settings of the finished parts that an interrupted run leaves in a folder for the next one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import remove_folder, whole_file
from splade_fast.search.lines import DataError

_SETTINGS = "settings.json"


def claim_folder(folder: Path, settings: dict[str, Any], *, should_keep: bool, verb: str) -> None:
    """Store the settings of all parts, or compare them with those of the parts that exist.

    Args:
        folder: folder of the parts; emptied unless its parts are kept.
        settings: values of JSON by the name that a message gives them.
        should_keep: whether to keep the parts that an earlier run has left.
        verb: name of the work, for a message.

    Raises:
        DataError: a part was made with other settings, or the file of settings is damaged.
    """
    file = folder / _SETTINGS
    if not (should_keep and file.exists()):
        remove_folder(folder)
        folder.mkdir()
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(settings), encoding="utf-8")
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        theirs = {name: stored[name] for name in settings}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    for name, value in settings.items():
        if theirs[name] != value:
            raise DataError(
                f"resume must go on with the {name} of the chunks in {folder}, {theirs[name]}, "
                f"got {value}; {verb} without it to start again"
            )
