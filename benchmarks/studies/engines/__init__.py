"""Encoding by splade_fast and by the engines that people use on a CPU, with the real checkpoint.

"documents" are docstrings of up to 128 tokens in batches of 32; "query" is one summary of at most
16 tokens at a time, from the string to the sparse row. Each contender has a process of its own, and
they run in turns; queries run in blocks of 15, each after an untimed block. "documents" and
"quality" run by groups of contenders, and splade_fast is in each group of documents. "quality" has
the largest difference from plain PyTorch in float64, and MRR@10 of held-out summaries among
docstrings. "body" runs the batches of the documents through the transformer alone.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.inputs.trained_states import fetched
from benchmarks.studies.engines.contenders import (
    BODIES,
    CONTENDERS,
    PooledModel,
    export_files,
    load_masked_lm,
    tokenized,
)
from benchmarks.studies.engines.processes import ContenderProcess, running
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import Pair, docstring_pairs, spread
from examples.docstrings.training import split_pairs
from splade_fast.search.evaluation import evaluate_vectors

__all__ = ["CONTENDERS", "measurements"]

DOCUMENTS, QUERIES = 100, 150
THREADS = (1, 2)
GROUPS = (
    "splade_fast",
    "SparseEncoder",
    "ONNX Runtime",
    "OpenVINO",
)  # as names of contenders begin
_COMPARED = 32  # documents compared with float64
_RANKED = 800  # documents among which a fourth are looked for
_QUERY_TOKENS = 16
_BATCH, _BLOCK = 32, 15
_WARM_UPS = 4  # of all queries
_TARGET = 0.6  # of the latency of ONNX Runtime


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        **{f"quality {group}": partial(_measure_quality, group) for group in GROUPS},
        **{f"documents {group}": partial(_measure_documents, rounds, group) for group in GROUPS},
        "body": partial(_measure_bodies, rounds),
        **{f"query {n} threads": partial(_measure_queries, rounds, n) for n in THREADS},
    }


def _members(group: str) -> list[str]:
    """Return the contenders of a group; accelerate(SparseEncoder) is ours."""
    prefixes = (group, "accelerate") if group == "splade_fast" else (group,)
    return [name for name in CONTENDERS if name.startswith(prefixes)]


def _measure_quality(group: str) -> list[Measurement]:
    texts = list(spread([pair.document for pair in docstring_pairs()], DOCUMENTS))[:_COMPARED]
    exact = _in_float64(texts)
    measurement = partial(Measurement, study="engines", part="quality", subject=_subject())
    found = []
    for name in _members(group):
        with running([name], _model(), _folder(), torch.get_num_threads()) as processes:
            for process in processes.values():
                difference = (process.encode(texts, _BATCH).to_dense() - exact).abs().max().item()
                mrr = _mrr(process)
                found += [
                    measurement(contender=name, quantity="largest difference", value=difference),
                    measurement(contender=name, quantity="MRR@10", value=mrr),
                ]
    return found


def _measure_documents(rounds: Rounds, group: str) -> list[Measurement]:
    names = dict.fromkeys(["splade_fast", *_members(group)])
    return _measure_throughput("documents", names, rounds, f", {group}")


def _measure_bodies(rounds: Rounds) -> list[Measurement]:
    return _measure_throughput("body", BODIES, rounds)


def _measure_throughput(
    part: str, names: Iterable[str], rounds: Rounds, group: str = ""
) -> list[Measurement]:
    threads = torch.get_num_threads()
    texts = list(spread([pair.document for pair in docstring_pairs()], DOCUMENTS))
    with running(names, _model(), _folder(), threads) as processes:
        times = _times_in_turns(processes, [[texts]], _BATCH, rounds)
    return [
        Measurement(
            study="engines",
            part=part,
            subject=_subject(threads) + group,
            contender=name,
            quantity="documents/s",
            value=len(texts) / statistics.median(milliseconds) * 1e3,
            unit="1/s",
            rounds=len(milliseconds),
        )
        for name, milliseconds in times.items()
    ]


def _measure_queries(rounds: Rounds, threads: int) -> list[Measurement]:
    """Measure the latency of single queries."""
    tokenizer = AutoTokenizer.from_pretrained(_model())
    summaries = [pair.query for pair in docstring_pairs()]
    short = [text for text in summaries if len(tokenizer(text)["input_ids"]) <= _QUERY_TOKENS]
    queries = spread(short, QUERIES)
    blocks = [[[q] for q in queries[i : i + _BLOCK]] for i in range(0, len(queries), _BLOCK)]
    with running(CONTENDERS, _model(), _folder(), threads) as processes:
        times = _times_in_turns(processes, blocks, 1, rounds)
    measurement = partial(Measurement, study="engines", part="query", subject=_subject(threads))
    found = []
    percentiles = {name: statistics.quantiles(values, n=100) for name, values in times.items()}
    for number in (50, 99):
        for name, values in percentiles.items():
            found.append(
                measurement(
                    contender=name,
                    quantity=f"p{number}",
                    value=values[number - 1],
                    unit="ms",
                    rounds=len(times[name]),
                )
            )
        found += _beside_onnx(percentiles, number, measurement)
    return found


def _beside_onnx(
    percentiles: Mapping[str, Sequence[float]], number: int, measurement: Callable[..., Measurement]
) -> list[Measurement]:
    """Return our latency in units of ONNX Runtime's, where both are there."""
    ours = [name for name in ("splade_fast", "splade_fast, compiled") if name in percentiles]
    return [
        measurement(
            contender=name,
            quantity=f"p{number} / ONNX Runtime",
            value=percentiles[name][number - 1] / percentiles["ONNX Runtime"][number - 1],
            at_most=_TARGET,
        )
        for name in ours
        if "ONNX Runtime" in percentiles
    ]


def _times_in_turns(
    processes: Mapping[str, ContenderProcess],
    blocks: Sequence[Sequence[Sequence[str]]],
    batch_size: int,
    rounds: Rounds,
) -> dict[str, list[float]]:
    """Return the milliseconds of all calls by contender, after untimed calls.

    The head computes a basis for its screening once, after 32 D tokens, and is faster from then on.
    """
    names = list(processes)
    has_queries = len(blocks) > 1
    for name in names:
        for block in [*blocks] * (_WARM_UPS if has_queries else 1):
            processes[name].times(block, batch_size)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds.rounds * len(blocks)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            # The first queries find the caches full of the last contender's data.
            untimed = blocks[turn % len(blocks) - 1] if has_queries else []
            calls = [*untimed, *blocks[turn % len(blocks)]]
            times[name] += processes[name].times(calls, batch_size)[len(untimed) :]
    return times


def _subject(threads: int | None = None) -> str:
    return "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"


def held_out_pairs() -> list[Pair]:
    """Return the summaries and bodies of modules that no training of ours has read."""
    return split_pairs(docstring_pairs()).held_out


def _model() -> str:
    return str(fetched(DEMO))


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def _folder() -> Path:
    """Return the folder of the exported models, which goes with this process."""
    folder = Path(_temporary().name)
    export_files(_model(), folder)
    return folder


@torch.no_grad()
def _in_float64(texts: list[str]) -> Tensor:
    inputs = tokenized(AutoTokenizer.from_pretrained(_model()), texts)
    pooled: Tensor = PooledModel(load_masked_lm(_model()).double())(**inputs)
    return pooled


def _mrr(process: ContenderProcess) -> float:
    """Return MRR@10 of summaries of held-out modules among docstrings."""
    pairs = spread(held_out_pairs(), _RANKED)
    ids = [str(number) for number in range(len(pairs))]
    asked = ids[::4]
    queries = [pairs[int(number)].query for number in asked]
    measures = evaluate_vectors(
        {number: {number: 1} for number in asked},
        asked,
        process.encode(queries, _BATCH),
        ids,
        process.encode([pair.document for pair in pairs], _BATCH),
    )
    return measures["MRR@10"]
