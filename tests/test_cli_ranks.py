"""`splade-fast encode` under torchrun."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.selection import ALL
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CONSOLE_SCRIPT = str(Path(sys.executable).with_name("splade-fast"))
COUNT = 25


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path):
    draw = random.Random(0)
    lines = [f"d{i}\t{' '.join(draw.choices(WORDS, k=1 + i % 20))}\n" for i in range(COUNT)]
    (tmp_path / "corpus.tsv").write_text("".join(lines))
    return tmp_path / "corpus.tsv"


def encode(program, corpus, model, index):
    """Run the encode command with one thread per process, as torchrun does."""
    options = [f"--model={model}", "--chunk-size=4", "--batch-size=3", "--k=9"]
    return subprocess.run(
        [*program, "encode", str(corpus), str(index), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_same_bytes_as_one_process(corpus, model, tmp_path):
    programs = {
        "one": [sys.executable, "-m", "splade_fast"],
        "two": [*TORCHRUN, "--nproc-per-node=2", "--no-python", CONSOLE_SCRIPT],
    }
    if os.environ.get(ALL):
        programs["three"] = [*TORCHRUN, "--nproc-per-node=3", "-m", "splade_fast"]
    indices = {}
    for name, program in programs.items():
        result = encode(program, corpus, model, tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(f"{COUNT} documents") == 1
        assert "rank 1" not in result.stderr  # one progress bar
        indices[name] = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    assert len(indices["one"]) == 3
    for name, files in indices.items():
        assert files == indices["one"], name
    assert len(list(tmp_path.iterdir())) == len(programs) + 1


def assert_all_failed(result, ranks, message, corpus):
    """Check that each rank exits with 2, or is ended by torchrun after another has left."""
    assert result.returncode != 0
    codes = re.findall(r"exitcode  : (\S+)", result.stderr)
    assert len(codes) == ranks
    assert set(codes) - {"-15"} == {"2"}
    assert result.stderr.count(f"Error: {message}") == 1
    for folder in ("splade_fast", "tests"):
        assert f'File "{ROOT / folder}' not in result.stderr  # no traceback of ours
    assert not (corpus.parent / "index").exists()


# tests/search/test_encode_corpus.py fails ranks without torchrun, in all ways.
@pytest.mark.exhaustive
def test_a_damaged_end_of_the_corpus(corpus, model, tmp_path):
    with corpus.open("a") as file:
        file.write("d0\tagain\n")
    program = [*TORCHRUN, "--nproc-per-node=2", "-m", "splade_fast"]
    result = encode(program, corpus, model, tmp_path / "index")
    assert_all_failed(result, 2, f"{corpus}, line {COUNT + 1}: id 'd0' appears a second", corpus)


@pytest.mark.exhaustive
def test_a_rank_that_raises(corpus, model, tmp_path):
    program = [*TORCHRUN, "--nproc-per-node=3", "-m", "tests.failing_encode", "raise"]
    result = encode(program, corpus, model, tmp_path / "index")
    assert_all_failed(result, 3, "no space left on rank 1", corpus)


def test_a_rank_that_is_killed(corpus, model, tmp_path):
    """torchrun ends the first rank with SIGTERM in the middle of a chunk."""
    program = [*TORCHRUN, "--nproc-per-node=2", "-m", "tests.failing_encode", "killed"]
    result = encode(program, corpus, model, tmp_path / "index")
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL) received" in result.stderr
    assert not (tmp_path / "index").exists()
