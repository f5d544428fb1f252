"""Every Python block of the README runs as it stands, on a tiny checkpoint."""

import re
from pathlib import Path

import pytest

from tests.tiny_models import masked_lm_configs, save_checkpoint

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "checkpoint")
    exec(compile(code.replace("CHECKPOINT", str(checkpoint)), "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
