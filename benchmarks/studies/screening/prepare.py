"""What the int8 weight costs: in time beside a training step, and in memory beside the weight."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.timing import Contender, nothing, time_in_turns
from benchmarks.inputs.inputs import seeded
from benchmarks.inputs.trained import TrainedInputs
from benchmarks.studies.screening.facts import Finding
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.head.screening import ScreeningState

MAX_SHARE_OF_STEP = 3.0  # %
MAX_MEMORY = 0.3  # of the float32 weight


def study(inputs: TrainedInputs, dtype: torch.dtype, rounds: int, seconds: float) -> list[Finding]:
    """The preparation alone: the check for changes, the mean of the tokens, the rounding."""
    typed = inputs.to(dtype)
    finding = partial(
        Finding,
        study="prepare",
        model=inputs.model,
        dim=inputs.dim,
        dtype=str(dtype).removeprefix("torch."),
    )
    prepared = ScreeningState().prepare(
        typed.weight, typed.weight, typed.bias, typed.hidden, typed.mask.bool()
    )
    tensors = (prepared.mean, prepared.packed, prepared.rows)
    memory = sum(tensor.nbytes for tensor in tensors) / inputs.weight.nbytes
    median = _median_ms({"preparation": partial(_prepare, typed)}, rounds, seconds)
    return [
        finding(variant="preparation", quantity="median", value=median["preparation"], unit="ms"),
        finding(
            variant="preparation",
            quantity="memory",
            value=memory,
            unit="x float32 weight",
            at_most=MAX_MEMORY,
        ),
    ]


def study_of_training(
    folder: Path, texts: Sequence[str], max_length: int, rounds: int, seconds: float
) -> list[Finding]:
    """Beside a step of training on these texts: forward and backward of body and head."""
    encoder = SpladeEncoder.from_pretrained(folder).train()
    batch = encoder.tokenize(texts, max_length)
    upstream = torch.randn(len(texts), encoder.vocab_size, generator=seeded("cpu"))
    decoder = find_decoder(encoder.model)
    with torch.no_grad():
        hidden = hidden_before_decoder(encoder.model, **batch)
    weight, mask = decoder.weight.detach(), batch["attention_mask"]
    inputs = TrainedInputs("", hidden, mask, weight, decoder.bias.detach())

    def change() -> None:
        encoder.zero_grad()
        with torch.no_grad():
            decoder.weight[:0].zero_()  # counts as a change, as an optimiser's step does

    medians = _median_ms(
        {
            "preparation": partial(_prepare, inputs),
            "step": partial(_step, encoder, batch, upstream),
        },
        rounds,
        seconds,
        before=change,
    )
    finding = partial(
        Finding,
        study="prepare",
        model=f"training, {len(texts)} texts",
        dim=weight.shape[1],
        dtype="float32",
    )
    return [
        finding(variant="training step", quantity="median", value=medians["step"], unit="ms"),
        finding(variant="preparation", quantity="median", value=medians["preparation"], unit="ms"),
        finding(
            variant="preparation",
            quantity="share of the training step",
            value=100 * medians["preparation"] / medians["step"],
            unit="%",
            at_most=MAX_SHARE_OF_STEP,
        ),
    ]


def _prepare(inputs: TrainedInputs) -> None:
    ScreeningState().prepare(
        inputs.weight, inputs.weight, inputs.bias, inputs.hidden, inputs.mask.bool()
    )


def _step(encoder: SpladeEncoder, batch: dict[str, Tensor], upstream: Tensor) -> None:
    encoder(**batch).backward(upstream)


def _median_ms(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    before: Callable[[], None] = nothing,
) -> dict[str, float]:
    contenders = {name: Contender(run, before) for name, run in runs.items()}
    times = time_in_turns(contenders, rounds=rounds, seconds=seconds, device="cpu")
    return {name: statistics.median(values) for name, values in times.items()}
