"""Training killed at random times: python -m tests.training.kill [--points N] [--seed N]

Kills a run of `splade-fast train` with a negative cache (SIGKILL) at a random time, checks it and
resumes it, N times. Each run must end with the bytes of a run that was not killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from splade_fast.training.checkpoints.folders import check_checkpoint, find_checkpoints
from tests.training.runs import CACHE, SMALL, assert_same_state, checkpoint_in, write_pairs

STEPS, SAVE_STEPS = 100, 4
WEIGHTS = "model.safetensors"  # the last file that a run writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        test = KillTest(Path(folder))
        print(f"left alone: {STEPS} steps in {test.seconds:.1f} s", flush=True)
        for point in range(1, arguments.points + 1):
            print(f"{point:3}: {test.kill_and_resume(draw.uniform(0, test.seconds))}", flush=True)
    print(f"{arguments.points} of {arguments.points} runs ended with the bytes of the first")


class KillTest:
    """Killed runs, and one run that was not killed.

    Args:
        folder: an empty folder for the output directories.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        self._log = folder / "log.txt"
        self._model = checkpoint_in(folder)
        self._pairs = write_pairs(folder / "pairs.tsv", 200)
        self._whole = folder / "whole"
        process = self._start(self._whole)
        self._wait_for(self._whole, process)
        start = time.monotonic()
        self._wait_for(self._whole / WEIGHTS, process)
        self.seconds = time.monotonic() - start
        """Seconds from the output directory to the saved model."""
        self._end_well(process)

    def kill_and_resume(self, seconds: float) -> str:
        """Kill a run some seconds after it made its output directory, and resume it.

        Returns:
            A sentence for the user.

        Raises:
            AssertionError: the run did not end with the bytes of the run that was not killed.
        """
        self._runs += 1
        output = self._folder / str(self._runs)
        process = self._start(output)
        self._wait_for(output, process)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        found = [path.name for path in find_checkpoints(output)]
        for name in found:
            check_checkpoint(output / name, 1)
        unfinished = sorted(path.name for path in output.glob(".*"))
        self._end_well(self._start(output, "--resume"))
        last = f"checkpoint-{STEPS}"
        assert_same_state(output / last, self._whole / last)
        assert (output / WEIGHTS).read_bytes() == (self._whole / WEIGHTS).read_bytes()
        assert not list(output.glob(".*"))
        there = ", ".join(found + unfinished) or "no checkpoint"
        return f"killed after {seconds:.3f} s with {there}; resumed to the same bytes"

    def _start(self, output: Path, *flags: str) -> subprocess.Popen[bytes]:
        config = self._folder / "config.yaml"
        values = {
            **SMALL,
            **CACHE,
            "model_name_or_path": str(self._model),
            "train_data": str(self._pairs),
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
        }
        config.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "splade_fast", "train", "--config", str(config)]
        environment = {"HF_DATASETS_CACHE": str(self._folder / "datasets"), "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            return subprocess.Popen(
                [*command, "--output_dir", str(output), *flags],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        while not path.exists():
            assert process.poll() is None, self._log.read_text()
            time.sleep(0.001)

    def _end_well(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait(timeout=300) == 0, self._log.read_text()


if __name__ == "__main__":
    main()
