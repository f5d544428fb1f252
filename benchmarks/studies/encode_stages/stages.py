"""Times of the stages within an encode, and the batches that go through the transformer."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

import splade_fast as sf
from benchmarks.harness.timing import Rounds, garbage_collection_off
from splade_fast.encoders import hidden_states, splade, text_encoder
from splade_fast.integrations.sentence_transformers import batches as their_batches
from splade_fast.integrations.sentence_transformers import modules as their_modules
from splade_fast.ops.head import topk
from splade_fast.ops.sparse_rows import SparseRows

# Functions of each stage, as the modules that call them know them.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "tokenize": ((text_encoder, "token_tensors"), (their_batches, "_preprocess_fast")),
    "body": ((splade.SpladeEncoder, "_run"), (their_modules, "run_to_decoder")),
    "head": ((topk, "splade_head"),),
    "prune": ((SparseRows, "from_dense"),),
}


def record_stages(encode: Callable[[], object], rounds: Rounds) -> dict[str, float]:
    """Return the share of each stage in the time of an encode, and of "rest"."""
    passed = dict.fromkeys(STAGES, 0.0)
    whole = 0.0
    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for owner, name in places:
                stack.enter_context(_timed(owner, name, passed, stage))
        stack.enter_context(garbage_collection_off())
        for _ in range(rounds.rounds):
            started = time.perf_counter()
            encode()
            whole += time.perf_counter() - started
    shares = {stage: seconds / whole for stage, seconds in passed.items()}
    return shares | {"rest": 1 - sum(shares.values())}


@contextmanager
def _timed(owner: Any, name: str, passed: dict[str, float], stage: str) -> Iterator[None]:
    original = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            passed[stage] += time.perf_counter() - started

    with mock.patch.object(owner, name, staticmethod(run) if isinstance(owner, type) else run):
        yield


def batches_of(encoder: sf.SpladeEncoder, encode: Callable[[], object]) -> list[dict[str, Tensor]]:
    """Return the inputs of the transformer in an encode; a single text has no mask."""
    found: list[dict[str, Tensor]] = []
    base = type(encoder.model)
    own = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.get(name) for name in ("input_ids", "attention_mask")}
        found.append({name: value for name, value in given.items() if value is not None})
        return own(self, *args, **kwargs)

    with mock.patch.object(base, "forward", forward):
        encode()
    return found


def run_body(encoder: sf.SpladeEncoder, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        hidden_states.hidden_before_decoder(encoder.model, **batch)
