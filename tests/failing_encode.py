"""Run `splade-fast encode` with a failing rank: torchrun -m tests.failing_encode HOW encode ..."""

import os
import signal
import sys
import time

from splade_fast.cli import app
from splade_fast.encoders.text_encoder import TextEncoder

ENCODE = TextEncoder.encode_batches
FOREVER = 1000.0  # seconds


def failing(self, texts, *arguments):
    rank = int(os.environ["RANK"])
    rows = ENCODE(self, texts, *arguments)
    if HOW == "raise" and rank == 1:
        raise OSError("no space left on rank 1")
    if HOW == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "killed" and rank == 0:
        time.sleep(FOREVER)
    return rows


if __name__ == "__main__":
    HOW = sys.argv.pop(1)
    TextEncoder.encode_batches = failing
    app()
