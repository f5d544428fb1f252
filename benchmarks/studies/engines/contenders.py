"""Inference engines that people use on a CPU, each from strings to sparse rows.

ONNX Runtime and OpenVINO run the whole model with the pooling inside of the graph, which is their
best case: no logits leave the engine. Each tokenizes as transformers does, in batches sorted by
length. SparseEncoder runs them as well, where its own packages for them are installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

import splade_fast as sf
from splade_fast.encoders.hidden_states import hidden_before_decoder

MAX_LENGTH = 128
# Texts and batch size to sparse vectors, in the library's own form.
Encode = Callable[[list[str], int], sf.SparseRows | Tensor]
Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # one batch, to the output of the graph
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OPSET = 18
_ONNX, _ONNX_INT8, _ONNX_BODY = "model.onnx", "model-int8.onnx", "body.onnx"


class PooledModel(nn.Module):
    """Masked language model with its pooling, for an export as one graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).logits
        return torch.amax(logits.relu().log1p() * attention_mask[:, :, None], dim=1)


class BodyModel(nn.Module):
    """BERT up to the input of its decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert, self.transform = model.bert, model.cls.predictions.transform

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        states = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        hidden: Tensor = self.transform(states)
        return hidden


def export_onnx(model: str, folder: Path) -> Path:
    """Write the model and its pooling as `folder`/model.onnx, for any number and length of texts.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    return _export(PooledModel(load_masked_lm(model)), folder / _ONNX)


def _export_body(model: str, folder: Path) -> Path:
    return _export(BodyModel(load_masked_lm(model)), folder / _ONNX_BODY)


def _export(model: nn.Module, path: Path) -> Path:
    # Three tensors: an export takes inputs that are one tensor for one input.
    example = tuple(torch.full((2, 8), number) for number in (1, 1, 0))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    torch.onnx.export(
        model.eval(),
        example,
        path,
        input_names=list(_INPUTS),
        output_names=["output"],
        dynamic_shapes=({0: batch, 1: length},) * len(_INPUTS),
        opset_version=_OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def load_masked_lm(model: str) -> Any:
    """Return the masked language model, which attends by plain products as exports need it."""
    return AutoModelForMaskedLM.from_pretrained(model, attn_implementation="eager").eval()


def tokenized(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return all inputs of a PooledModel, (N, L) each."""
    found = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    one_segment = {"token_type_ids": torch.zeros_like(found["input_ids"])}
    return one_segment | dict(found)


def export_files(model: str, folder: Path) -> None:
    """Write the files that the engines load; print why one could not be written."""
    for write in (export_onnx, _quantize_onnx, _export_body):
        try:
            write(model, folder)
        except Exception as error:  # exporters fail in their own ways
            print(f"without files of {write.__name__.strip('_')}: {reason(error)}", flush=True)


def reason(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _splade_fast(model: str, folder: Path) -> Encode:
    return _encode_with(sf.SpladeEncoder.from_pretrained(model))


def _compiled(model: str, folder: Path) -> Encode:
    encoder = sf.SpladeEncoder.from_pretrained(model)
    encoder.compile(dynamic=True)
    return _encode_with(encoder)


def _encode_with(encoder: sf.SpladeEncoder) -> Encode:
    return lambda texts, batch_size: encoder.encode(
        texts, batch_size=batch_size, max_length=MAX_LENGTH, show_progress=False
    )


def _sentence_transformers(model: str, folder: Path, backend: Any = "torch") -> Encode:
    from sentence_transformers import SparseEncoder

    options: dict[str, Any] = {} if backend == "torch" else {"model_kwargs": {"export": True}}
    return _encode_with_theirs(SparseEncoder(model, device="cpu", backend=backend, **options))


def _accelerated(model: str, folder: Path) -> Encode:
    from sentence_transformers import SparseEncoder

    from splade_fast.integrations.sentence_transformers import accelerate

    return _encode_with_theirs(accelerate(SparseEncoder(model, device="cpu")))


def _encode_with_theirs(encoder: Any) -> Encode:
    encoder.max_seq_length = MAX_LENGTH

    return lambda texts, batch_size: encoder.encode(
        texts, batch_size=batch_size, show_progress_bar=False
    )


def _onnx_runtime(model: str, folder: Path) -> Encode:
    return _onnx_session(model, folder / _ONNX)


def _onnx_runtime_int8(model: str, folder: Path) -> Encode:
    return _onnx_session(model, folder / _ONNX_INT8)


def _quantize_onnx(model: str, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(folder / _ONNX, folder / _ONNX_INT8, weight_type=QuantType.QInt8)


def _onnx_session(model: str, path: Path) -> Encode:
    return _by_batches(model, _onnx_run(path))


def _onnx_run(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: array for name, array in inputs.items() if name in taken}
        output: np.ndarray = session.run(None, given)[0]
        return output

    return run


def _openvino(model: str, folder: Path) -> Encode:
    import openvino

    return _by_batches(model, _openvino_run(openvino.Core().read_model(folder / _ONNX)))


def _openvino_int8(model: str, folder: Path) -> Encode:
    import nncf
    import openvino

    weights_in_int8 = nncf.compress_weights(openvino.Core().read_model(folder / _ONNX))
    return _by_batches(model, _openvino_run(weights_in_int8))


def _openvino_run(graph: Any) -> Run:
    import openvino

    threads = torch.get_num_threads()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        # OpenVINO chooses int8 activations by the processor, and oneDNN then has no such product.
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    taken = [port.any_name for port in compiled.inputs]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        output: np.ndarray = compiled({name: inputs[name] for name in taken})[0]
        return output

    return run


def _by_batches(model: str, run: Run) -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(texts: list[str], batch_size: int) -> sf.SparseRows:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            inputs = tokenized(tokenizer, [texts[i] for i in order[start : start + batch_size]])
            pooled = run({name: tensor.numpy() for name, tensor in inputs.items()})
            parts.append(sf.SparseRows.from_dense(torch.from_numpy(pooled)))
        return sf.SparseRows.cat(parts)[torch.tensor(order).argsort()]

    return encode


def _torch_body(model: str, folder: Path) -> Encode:
    masked_lm = AutoModelForMaskedLM.from_pretrained(model).eval()  # with torch's fused attention

    @torch.inference_mode()
    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        output: np.ndarray = hidden_before_decoder(masked_lm, **tensors).numpy()
        return output

    return _only_run(model, run)


def _onnx_runtime_body(model: str, folder: Path) -> Encode:
    return _only_run(model, _onnx_run(folder / _ONNX_BODY))


def _openvino_body(model: str, folder: Path) -> Encode:
    import openvino

    return _only_run(model, _openvino_run(openvino.Core().read_model(folder / _ONNX_BODY)))


def _only_run(model: str, run: Run) -> Encode:
    """Return an encode that tokenizes texts once, and returns the states (T, D) of their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    known: dict[tuple[str, ...], list[dict[str, np.ndarray]]] = {}

    def encode(texts: list[str], batch_size: int) -> Tensor:
        if tuple(texts) not in known:
            order = sorted(texts, key=len, reverse=True)
            known[tuple(texts)] = [
                {
                    name: tensor.numpy()
                    for name, tensor in tokenized(tokenizer, order[i : i + batch_size]).items()
                }
                for i in range(0, len(order), batch_size)
            ]
        parts = [
            torch.from_numpy(run(batch)[batch["attention_mask"] != 0])
            for batch in known[tuple(texts)]
        ]
        return torch.cat(parts)

    return encode


# Transformers without a vocabulary.
BODIES: dict[str, Callable[[str, Path], Encode]] = {
    "torch, body": _torch_body,
    "ONNX Runtime, body": _onnx_runtime_body,
    "OpenVINO, body": _openvino_body,
}

CONTENDERS: dict[str, Callable[[str, Path], Encode]] = {
    "splade_fast": _splade_fast,
    "splade_fast, compiled": _compiled,
    "accelerate(SparseEncoder)": _accelerated,
    "SparseEncoder": _sentence_transformers,
    "SparseEncoder, ONNX": partial(_sentence_transformers, backend="onnx"),
    "SparseEncoder, OpenVINO": partial(_sentence_transformers, backend="openvino"),
    "ONNX Runtime": _onnx_runtime,
    "ONNX Runtime, int8": _onnx_runtime_int8,
    "OpenVINO": _openvino,
    "OpenVINO, int8 weights": _openvino_int8,
}
