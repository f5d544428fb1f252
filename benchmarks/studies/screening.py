"""Gain of the screened head by sparsity and size, and cost of its int8 weight.

sweep: time and surviving pairs against the share of active entries, and where the dense head
becomes the faster one. The bias of all entries is shifted together until the share is as wanted.
"auto" tries screening in every call, its worst case: left alone, it waits 2**n calls after
declining n times in a row.

prepare: time and memory of the int8 weight, alone and beside a training step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import splade_fast
from benchmarks.harness.results import TIME, Measurement
from benchmarks.harness.timing import Rounds, median_times
from benchmarks.inputs.batches import seeded
from benchmarks.inputs.trained_states import (
    DIMS,
    TrainedInputs,
    bias_for_share,
    fetched,
    largest_logits,
    sample_texts,
    trained_inputs,
)
from examples.docstrings.checkpoint import DEMO
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.head.screening import PreparedWeight, ScreeningState, find_screening_state

DTYPES = (torch.float32, torch.bfloat16)
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
ALGORITHMS = ("dense", "screened", "auto")
MAX_OVERHEAD = 5.0  # % of the dense head, where auto declines
MAX_SHARE_OF_STEP = 3.0  # %
MAX_MEMORY = 0.3  # of the float32 weight

_SWEPT_DOCUMENTS = 16
_TRAINING_DOCUMENTS, _TRAINING_LENGTH = 32, 256


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    found: dict[str, Callable[[], list[Measurement]]] = {}
    for dim in DIMS:
        for dtype in DTYPES:
            name = f"D {dim}, {_name(dtype)}"
            found[f"sweep, {name}"] = partial(_sweep_trained, dim, dtype, rounds)
            found[f"prepare, {name}"] = partial(_prepare_trained, dim, dtype, rounds)
    return found | {"prepare, training": partial(_prepare_in_training, rounds)}


def _sweep_trained(dim: int, dtype: torch.dtype, rounds: Rounds) -> list[Measurement]:
    return sweep(trained_inputs(dim).first(_SWEPT_DOCUMENTS), dtype, SHARES, rounds)


def _prepare_trained(dim: int, dtype: torch.dtype, rounds: Rounds) -> list[Measurement]:
    return prepare(trained_inputs(dim), dtype, rounds)


def _prepare_in_training(rounds: Rounds) -> list[Measurement]:
    texts = sample_texts(_TRAINING_DOCUMENTS)
    return prepare_in_training(fetched(DEMO), texts, _TRAINING_LENGTH, rounds)


# Sweep -------------------------------------------------------------------------------------------


def sweep(
    inputs: TrainedInputs, dtype: torch.dtype, shares: Sequence[float], rounds: Rounds
) -> list[Measurement]:
    """Measure at every share of active entries, and where the dense head becomes faster."""
    measurement = partial(
        Measurement,
        study="screening",
        part=f"sweep, D {inputs.dim}, {_name(dtype)}",
        subject=inputs.model,
        dtype=_name(dtype),
    )
    pooled = largest_logits(inputs.hidden, inputs.mask, inputs.weight) + inputs.bias
    found: list[Measurement] = []
    ratios: list[tuple[float, float]] = []
    for share in shares:
        shifted = dataclasses.replace(inputs, bias=inputs.bias + bias_for_share(pooled, share))
        at_share = partial(measurement, axis="active", size=share)
        point = _measure_point(shifted.to(dtype), at_share, rounds)
        times = {m.contender: m.value for m in point if m.quantity == TIME}
        ratios.append((share, times["screened"] / times["dense"]))
        found += point
    crossover = crossing(ratios)
    if crossover is not None:
        found.append(
            measurement(contender="screened", quantity="crossover", value=100 * crossover, unit="%")
        )
    return found


def _measure_point(
    inputs: TrainedInputs, measurement: Callable[..., Measurement], rounds: Rounds
) -> list[Measurement]:
    """Measure median times, surviving pairs, and the overhead of auto where it declines.

    Raises:
        AssertionError: screened and dense differ.
    """
    report = screened(inputs)
    head = partial(splade_fast.splade_head, inputs.hidden, inputs.weight, inputs.bias, inputs.mask)
    if not torch.equal(report.pooled, head(algorithm="dense")):
        raise AssertionError(f"screened differs from dense: {inputs.model} {inputs.weight.dtype}")
    state = find_screening_state(inputs.weight, inputs.weight.dtype)
    runs = {name: partial(head, algorithm=name) for name in ALGORITHMS}
    # Before each run the earlier declines are forgotten, so that auto tries again.
    times = median_times(runs, rounds, before=partial(state.record_trial, False))
    state.record_trial(False)
    head(algorithm="auto")
    has_declined = not state.should_try()

    found = [
        measurement(contender=name, quantity=TIME, value=times[name], unit="ms")
        for name in ALGORITHMS
    ]
    all_pairs = len(inputs.tokens) * len(inputs.weight)
    for quantity, pairs in (("compared pairs", report.compared), ("surviving pairs", report.pairs)):
        value = 100 * pairs / all_pairs
        found.append(measurement(contender="screened", quantity=quantity, value=value, unit="%"))
    found.append(measurement(contender="auto", quantity="declines", value=float(has_declined)))
    if has_declined:
        found.append(
            measurement(
                contender="auto",
                quantity="overhead over dense",
                value=100 * (times["auto"] / times["dense"] - 1),
                unit="%",
                at_most=MAX_OVERHEAD,
            )
        )
    return found


@dataclass(frozen=True)
class Report:
    """Result of the screened product, and the pairs of token and entry that it looked at."""

    pooled: Tensor  # (B, V)
    compared: int  # pairs whose bounds were compared one by one
    pairs: int  # pairs multiplied in full precision


def screened(inputs: TrainedInputs) -> Report:
    """Run the screened product itself, for max pooling and log1p_relu."""
    mean = inputs.tokens.float().mean(0)
    packed, rows = torch.ops.splade_fast.head_prepare(inputs.weight, mean)
    pooled, _, _, report = torch.ops.splade_fast.head_forward_screened(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.mask.bool(),
        None,
        0,
        1,
        False,
        False,
        mean,
        packed,
        rows,
        None,
        None,
        False,
    )
    _, compared, pairs, _ = report.tolist()
    return Report(pooled, compared, pairs)


def crossing(ratios: Sequence[tuple[float, float]]) -> float | None:
    """Return the share at which the ratio first reaches 1, on straight lines in logarithms."""
    for (before, lower), (after, upper) in pairwise(ratios):
        if lower < 1 <= upper:
            part = math.log(1 / lower) / math.log(upper / lower)
            return float(before * (after / before) ** part)
    return None


# Prepare -----------------------------------------------------------------------------------------


def prepare(inputs: TrainedInputs, dtype: torch.dtype, rounds: Rounds) -> list[Measurement]:
    """Measure the preparation: the check for changes, the mean of the tokens, the rounding."""
    typed = inputs.to(dtype)
    measurement = partial(
        Measurement,
        study="screening",
        part="prepare",
        subject=f"{inputs.model}, D {inputs.dim}",
        dtype=_name(dtype),
        contender="preparation",
    )
    prepared = _prepare(typed)
    tensors = (prepared.mean, prepared.packed, prepared.rows)
    memory = sum(tensor.nbytes for tensor in tensors) / inputs.weight.nbytes
    times = median_times({"preparation": partial(_prepare, typed)}, rounds)
    return [
        measurement(quantity=TIME, value=times["preparation"], unit="ms"),
        measurement(quantity="memory", value=memory, unit="x float32 weight", at_most=MAX_MEMORY),
    ]


def prepare_in_training(
    folder: Path, texts: Sequence[str], max_length: int, rounds: Rounds
) -> list[Measurement]:
    """Measure the preparation beside forward and backward of body and head on these texts."""
    encoder = SpladeEncoder.from_pretrained(folder).train()
    batch = encoder.tokenize(texts, max_length)
    upstream = torch.randn(len(texts), encoder.vocab_size, generator=seeded("cpu"))
    decoder = find_decoder(encoder.model)
    with torch.no_grad():
        hidden = hidden_before_decoder(encoder.model, **batch)
    weight, mask = decoder.weight.detach(), batch["attention_mask"]
    inputs = TrainedInputs("", hidden, mask, weight, decoder.bias.detach())

    def change_weight() -> None:
        encoder.zero_grad()
        with torch.no_grad():
            decoder.weight[:0].zero_()  # counts as a change, as an optimiser's step does

    runs: dict[str, Callable[[], object]] = {
        "preparation": partial(_prepare, inputs),
        "training step": lambda: encoder(**batch).backward(upstream),
    }
    times = median_times(runs, rounds, before=change_weight)
    measurement = partial(
        Measurement,
        study="screening",
        part="prepare",
        subject=f"training, {len(texts)} texts",
    )
    return [
        *(
            measurement(contender=name, quantity=TIME, value=value, unit="ms")
            for name, value in times.items()
        ),
        measurement(
            contender="preparation",
            quantity="share of the training step",
            value=100 * times["preparation"] / times["training step"],
            unit="%",
            at_most=MAX_SHARE_OF_STEP,
        ),
    ]


def _prepare(inputs: TrainedInputs) -> PreparedWeight:
    return ScreeningState().prepare(
        inputs.weight, inputs.weight, inputs.bias, inputs.hidden, inputs.mask.bool()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
