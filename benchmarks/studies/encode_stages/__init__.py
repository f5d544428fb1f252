"""One encode by stage: what tokenizing, body, head, pruning, copies and order take.

The models are the demo's checkpoint and BERTs of random weights; the texts are docstrings of at
most 128 tokens in batches of 32. "share of body" is the time of the same batches through the
transformer alone, over that of the encode: 1 if everything else took nothing. "padding" is the
share of the tokens in these batches that are padding. "rest" is order, copies and everything else.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Contender, Rounds, time_in_turns
from benchmarks.studies.encode_stages.encoders import ENCODERS, SIZES, Size, load
from benchmarks.studies.encode_stages.stages import STAGES, batches_of, record_stages, run_body
from examples.docstrings.corpus import docstring_pairs, spread

_BATCH, _MAX_LENGTH = 32, 128
_LEAST_SHARE, _MOST_PADDING = 0.85, 0.03


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        f"{kind} {size.name}": partial(_measure, kind, size, rounds)
        for size in SIZES
        for kind in ENCODERS
    }


def _documents(count: int) -> list[str]:
    return list(spread([pair.document for pair in docstring_pairs()], count))


def _measure(kind: str, size: Size, rounds: Rounds) -> list[Measurement]:
    texts = _documents(size.documents)
    encoder = load(size, texts)
    encode = partial(ENCODERS[kind](encoder), texts, _BATCH, _MAX_LENGTH)
    with torch.inference_mode():
        batches = batches_of(encoder, encode)
        times = time_in_turns(
            {"encode": Contender(encode), "body": Contender(partial(run_body, encoder, batches))},
            rounds,
        )
        stages = record_stages(encode, rounds)
    measurement = partial(Measurement, study="encode_stages", part=kind, subject=size.name)
    whole, body = (statistics.median(times[name]) for name in ("encode", "body"))
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches if len(batch) > 1)
    through_body = sum(batch["input_ids"].numel() for batch in batches)
    found = [
        measurement(quantity=stage, value=100 * stages[stage], unit="%")
        for stage in (*STAGES, "rest")
    ]
    return [
        *found,
        measurement(quantity="encode", value=whole, unit="ms", rounds=len(times["encode"])),
        measurement(quantity="body alone", value=body, unit="ms", rounds=len(times["body"])),
        measurement(quantity="share of body", value=body / whole, at_least=_LEAST_SHARE),
        measurement(quantity="padding", value=padding / through_body, at_most=_MOST_PADDING),
    ]
