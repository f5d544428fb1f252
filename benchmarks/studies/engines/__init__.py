"""Encoding by splade_fast and by the engines that people use on a CPU, with the real checkpoint.

"documents" are docstrings of up to 128 tokens in batches of 32; "query" is one summary of at most
16 tokens at a time, from the string to the sparse row. The largest difference is from plain PyTorch
in float64, and MRR@10 is that of held-out summaries among all docstrings of the sample.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Contender, Rounds, median_times, time_in_turns
from benchmarks.inputs.trained_states import fetched
from benchmarks.studies.engines.contenders import (
    CONTENDERS,
    Encode,
    PooledModel,
    load_contenders,
    load_masked_lm,
    tokenized,
)
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import Pair, docstring_pairs, spread
from examples.docstrings.training import split_pairs
from splade_fast.search.evaluation import evaluate_vectors

__all__ = ["CONTENDERS", "measurements"]

DOCUMENTS, QUERIES = 200, 150
_COMPARED = 32  # documents compared with float64
_QUERY_TOKENS = 16
_BATCH = 32


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        "documents": partial(_measure_documents, rounds),
        "query": partial(_measure_queries, rounds),
    }


def _measure_documents(rounds: Rounds) -> list[Measurement]:
    texts = list(spread([pair.document for pair in docstring_pairs()], DOCUMENTS))
    contenders = _contenders()
    measurement = partial(
        Measurement, study="engines", part="documents", subject=f"batches of {_BATCH}"
    )
    exact = _in_float64(texts[:_COMPARED])
    found = []
    for name, encode in contenders.items():
        difference = (encode(texts[:_COMPARED], _BATCH).to_dense() - exact).abs().max().item()
        found.append(measurement(contender=name, quantity="largest difference", value=difference))
        found.append(measurement(contender=name, quantity="MRR@10", value=_mrr(encode)))
    runs = {name: partial(encode, texts, _BATCH) for name, encode in contenders.items()}
    times = median_times(runs, rounds)
    for name, milliseconds in times.items():
        speed = len(texts) / milliseconds * 1e3
        found.append(measurement(contender=name, quantity="documents/s", value=speed, unit="1/s"))
    return found


def _measure_queries(rounds: Rounds) -> list[Measurement]:
    """Measure the latency of single queries, the contenders in turns."""
    tokenizer = AutoTokenizer.from_pretrained(_model())
    summaries = [pair.query for pair in docstring_pairs()]
    short = [text for text in summaries if len(tokenizer(text)["input_ids"]) <= _QUERY_TOKENS]
    queries = list(spread(short, QUERIES))
    contenders = _contenders()
    runs = {
        name: Contender(partial(_encode_next, encode, cycle(queries)))
        for name, encode in contenders.items()
    }
    times = time_in_turns(runs, Rounds(len(queries) * rounds.rounds, rounds.seconds))
    found = []
    for name, milliseconds in times.items():
        measurement = partial(
            Measurement,
            study="engines",
            part="query",
            subject=f"one query of at most {_QUERY_TOKENS} tokens",
            contender=name,
            unit="ms",
            rounds=len(milliseconds),
        )
        percentiles = statistics.quantiles(milliseconds, n=100)
        found.append(measurement(quantity="p50", value=statistics.median(milliseconds)))
        found.append(measurement(quantity="p99", value=percentiles[98]))
    return found


def _encode_next(encode: Encode, queries: Iterator[str]) -> None:
    encode([next(queries)], 1)


def held_out_pairs() -> list[Pair]:
    """Return the summaries and bodies of modules that no training of ours has read."""
    return split_pairs(docstring_pairs()).held_out


def _model() -> str:
    return str(fetched(DEMO))


@cache
def _contenders() -> dict[str, Encode]:
    folder = tempfile.TemporaryDirectory()
    found, missing = load_contenders(_model(), Path(folder.name))
    for name, reason in missing.items():
        print(f"without {name}: {reason}", flush=True)
    return found


@torch.no_grad()
def _in_float64(texts: list[str]) -> Tensor:
    inputs = tokenized(AutoTokenizer.from_pretrained(_model()), texts)
    pooled: Tensor = PooledModel(load_masked_lm(_model()).double())(**inputs)
    return pooled


def _mrr(encode: Encode) -> float:
    """Return MRR@10 of summaries of held-out modules among docstrings."""
    pairs = spread(held_out_pairs(), 4 * DOCUMENTS)
    ids = [str(number) for number in range(len(pairs))]
    asked = ids[::4]
    queries = [pairs[int(number)].query for number in asked]
    measures = evaluate_vectors(
        {number: {number: 1} for number in asked},
        asked,
        encode(queries, _BATCH),
        ids,
        encode([pair.document for pair in pairs], _BATCH),
    )
    return measures["MRR@10"]
