"""Choose the product of the head's forward: dense or screened."""

from typing import NamedTuple

import torch
from torch import Tensor

from splade_fast.ops.head import screening_hopper
from splade_fast.ops.head.screening import DENSE, SCREENED, decoder_of, is_candidate

Outputs = tuple[Tensor, Tensor, Tensor]  # pooled, max_logits, argmax


class HeadCall(NamedTuple):
    """What all products take, in the order of their schemas."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    pooling: int
    activation: int
    save: bool
    float_output: bool

    @property
    def on_cuda(self) -> bool:
        return self.hidden.device.type == "cuda"


def forward(call: HeadCall, algorithm: int, source: Tensor) -> Outputs:
    """The screened product where it is asked for or pays, else the dense one.

    Args:
        call: the arguments of the op.
        algorithm: a number of ALGORITHMS.
        source: what the weight was cast from, or the weight.
    """
    ops = torch.ops.splade_fast
    forced = algorithm == SCREENED
    if forced and call.on_cuda:
        return _forward_on_hopper(call, source)
    if forced or (algorithm != DENSE and is_candidate(call.hidden, call.attention_mask, call.save)):
        decoder = decoder_of(source, call.weight.dtype)
        if forced or decoder.asks():
            ready = decoder.prepare(
                call.weight, source, call.bias, call.hidden, call.attention_mask, call.save
            )
            outputs: tuple[Tensor, Tensor, Tensor, Tensor] = ops.head_forward_screened(
                *call, *ready.arguments, not forced
            )
            declined, _, _, percent_of_product = outputs[3].tolist()
            decoder.record_product(percent_of_product)
            if not forced:
                decoder.record(bool(declined))
            if not declined:
                return outputs[:3]
    dense: Outputs = ops.head_forward_dense(*call, call.on_cuda and permits_tf32())
    return dense


def _forward_on_hopper(call: HeadCall, source: Tensor) -> Outputs:
    """The screened product; where too much is left over the GPU itself goes on to the dense one."""
    screening_hopper.check_runs(call.hidden, call.pooling)
    ops = torch.ops.splade_fast
    if call.hidden.numel() == 0 or call.weight.numel() == 0:
        empty: Outputs = ops.head_forward_dense(*call)
        return empty
    decoder = decoder_of(source, call.weight.dtype)
    ready = screening_hopper.prepare(decoder, call.weight, source, call.hidden, call.attention_mask)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = ops.head_forward_screened(
        *call, *ready.arguments, False
    )
    return outputs[:3]


def permits_tf32() -> bool:
    """Whether torch's own float32 products on CUDA may use TF32, as it is set when the head runs.

    Of the ways to ask this one alone answers however it was set.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
