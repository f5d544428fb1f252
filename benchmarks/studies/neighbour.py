"""Encoding and the head beside a busy process, and with more threads than cores.

Products of torch run in the same turns: "bare product" is `torch.mm` of the head's tokens, and
"transformer" the model without its head, which is torch's own. "loss" is the time beside one busy
process over the time alone. The loss of ours may not exceed that of torch's own products: the head
is held to the bare product, an encode to the larger loss of bare product and transformer.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

import splade_fast as sf
from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Contender, Rounds, time_in_turns
from benchmarks.inputs.trained_states import (
    TrainedInputs,
    fetched,
    sample_texts,
    trained_inputs,
)
from benchmarks.studies.encode_stages.stages import batches_of, run_body
from examples.docstrings.checkpoint import DEMO

THREADS = (1, 2, 4)
_DOCUMENTS, _BATCH, _MAX_LENGTH = 16, 32, 128
_SECONDS = 4.0  # of the rounds, alone and beside the busy process
_TOLERANCE = 1.1  # quartiles of such rounds are further apart
_KINDS = {"encode": ("bare product", "transformer"), "head": ("bare product",)}


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {f"{threads} threads": partial(_measure, threads, rounds) for threads in THREADS}


def _measure(threads: int, rounds: Rounds) -> list[Measurement]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rounds = Rounds(rounds.rounds, min(rounds.seconds, _SECONDS))
    try:
        with torch.inference_mode():
            contenders = _contenders()
            alone = _medians(contenders, rounds)
            with _busy_process():
                beside = _medians(contenders, rounds)
    finally:
        torch.set_num_threads(before)
    subject = f"{threads} thread{'s' if threads > 1 else ''}, {os.cpu_count()} cores"
    measurement = partial(Measurement, study="neighbour", part="busy process", subject=subject)
    losses = {name: beside[name] / alone[name] for name in contenders}
    found = []
    for name in contenders:
        bound = None
        if name in _KINDS:
            bound = _TOLERANCE * max(losses[other] for other in _KINDS[name])
        found += [
            measurement(contender=name, quantity="alone", value=alone[name], unit="ms"),
            measurement(contender=name, quantity="beside it", value=beside[name], unit="ms"),
            measurement(contender=name, quantity="loss", value=losses[name], at_most=bound),
        ]
    return found


def _contenders() -> dict[str, Contender]:
    encoder = load_encoder()
    texts = load_texts()
    encode = partial(
        encoder.encode, texts, batch_size=_BATCH, max_length=_MAX_LENGTH, show_progress=False
    )
    batches = batches_of(encoder, encode)
    inputs = load_inputs()
    mask = inputs.mask.bool()
    head = partial(sf.splade_head, inputs.hidden, inputs.weight, inputs.bias, mask)
    tokens = inputs.tokens
    logits = torch.empty(len(tokens), len(inputs.weight))
    return {
        "encode": Contender(encode),
        "transformer": Contender(partial(run_body, encoder, batches)),
        "head": Contender(head),
        "bare product": Contender(partial(torch.mm, tokens, inputs.weight.T, out=logits)),
    }


def load_encoder() -> sf.SpladeEncoder:
    return sf.SpladeEncoder.from_pretrained(str(fetched(DEMO)))


def load_texts() -> list[str]:
    return sample_texts(_DOCUMENTS)


def load_inputs() -> TrainedInputs:
    return trained_inputs(128).first(_DOCUMENTS)


def _medians(contenders: Mapping[str, Contender], rounds: Rounds) -> dict[str, float]:
    times = time_in_turns(contenders, rounds)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def _busy_process() -> Iterator[None]:
    """Keep one core busy in the block."""
    process = multiprocessing.get_context("spawn").Process(target=_compute_for_ever, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _compute_for_ever() -> None:
    while True:
        sum(range(1000))
