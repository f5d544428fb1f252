"""Every block of code in the README and in docs/ runs as it stands, on a tiny checkpoint.

Python blocks run alone, each in a folder of its own. A diff block is a script before and after a
change: both sides run.
"""

import re
from pathlib import Path

import pytest

from tests.tiny_models import causal_lm_configs, masked_lm_configs, save_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", flags=re.S | re.M)


def side(diff: str, keep: str) -> str:
    """One side of a diff: keep is "-" for the script before, "+" for the one after."""
    lines = diff.splitlines()
    kept = [line[1:] for line in lines if not line or line[0] in (" ", keep)]
    unknown = [line for line in lines if line and line[0] not in " +-"]
    assert not unknown, f"a line of a diff starts with a blank, + or -, got {unknown[0]!r}"
    return "\n".join(kept) + "\n"


def scripts(page: Path) -> list[tuple[str, str]]:
    """(name, code) of every script of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        language, code = match.groups()
        name = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        if language == "python":
            found.append((name, code))
        else:
            found += [(f"{name}:before", side(code, "-")), (f"{name}:after", side(code, "+"))]
    return found


SCRIPTS = [script for page in PAGES for script in scripts(page)]


@pytest.mark.parametrize(("name", "code"), SCRIPTS, ids=[name for name, _ in SCRIPTS])
def test_script_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "checkpoint")
    code = code.replace("CHECKPOINT", str(checkpoint))
    if "DECODER_MODEL" in code:
        decoder = save_checkpoint(causal_lm_configs()["qwen3"], tmp_path / "decoder")
        code = code.replace("DECODER_MODEL", str(decoder))
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def test_readme_has_scripts():
    assert sum(name.startswith("README.md") for name, _ in SCRIPTS) >= 2


def test_sides_of_a_diff():
    diff = " import a\n-before()\n+after()\n\n end()\n"
    assert side(diff, "-") == "import a\nbefore()\n\nend()\n"
    assert side(diff, "+") == "import a\nafter()\n\nend()\n"
    with pytest.raises(AssertionError, match="starts with"):
        side("import a\n", "+")
