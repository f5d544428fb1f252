"""Cache folder of the user, for inputs that take long to make from the demo's corpus."""

import hashlib
import importlib.metadata
from pathlib import Path

from examples.docstrings.corpus import PACKAGES


def cache_folder(kind: str, checkpoint: str, settings: str, cache: Path | None = None) -> Path:
    """Return the folder of inputs made with these settings from the installed packages."""
    cache = cache or Path.home() / ".cache" / "splade_fast"
    versions = [f"{name}=={_version(name)}" for name in PACKAGES]
    made_of = " ".join([checkpoint, *versions, settings])
    return cache / f"{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
