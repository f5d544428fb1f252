"""The user's script that make lint type-checks also runs."""

import runpy
from pathlib import Path


def test_script_runs():
    runpy.run_path(str(Path(__file__).parent / "public_api.py"))
