"""Inference engines that people use on a CPU, each from strings to sparse rows.

ONNX Runtime and OpenVINO run the whole model with the pooling inside of the graph, which is their
best case: no logits leave the engine. Each contender tokenizes as transformers does, in batches
sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

import splade_fast as sf

MAX_LENGTH = 128
Encode = Callable[[list[str], int], sf.SparseRows]  # texts and batch size
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OPSET = 18


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


def export_onnx(model: str, folder: Path) -> Path:
    """Write the model and its pooling as `folder`/model.onnx, for any number and length of texts.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    pooled = PooledModel(load_masked_lm(model)).eval()
    # Three tensors: an export takes inputs that are one tensor for one input.
    example = tuple(torch.full((2, 8), number) for number in (1, 1, 0))
    path = folder / "model.onnx"
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    torch.onnx.export(
        pooled,
        example,
        path,
        input_names=list(_INPUTS),
        output_names=["pooled"],
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


def load_contenders(model: str, folder: Path) -> tuple[dict[str, Encode], dict[str, str]]:
    """Return the contenders that this machine has, and the reasons for missing ones.

    Args:
        model: name or folder of the checkpoint.
        folder: folder for the files of the exported models.
    """
    found: dict[str, Encode] = {}
    missing: dict[str, str] = {}
    for name, load in CONTENDERS.items():
        try:
            found[name] = load(model, folder)
        # Exporters and engines fail in their own ways, none of which stops the others.
        except Exception as error:
            if name == "splade_fast":
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing


def _splade_fast(model: str, folder: Path) -> Encode:
    encoder = sf.SpladeEncoder.from_pretrained(model)
    return lambda texts, batch_size: encoder.encode(
        texts, batch_size=batch_size, max_length=MAX_LENGTH, show_progress=False
    )


def _sentence_transformers(model: str, folder: Path) -> Encode:
    from sentence_transformers import SparseEncoder

    encoder = SparseEncoder(model, device="cpu")
    encoder.max_seq_length = MAX_LENGTH

    def encode(texts: list[str], batch_size: int) -> sf.SparseRows:
        vectors: Any = encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return sf.SparseRows.from_dense(vectors.to_dense())

    return encode


def _onnx_runtime(model: str, folder: Path) -> Encode:
    path = folder / "model.onnx"
    return _onnx_session(model, path if path.exists() else export_onnx(model, folder))


def _onnx_runtime_int8(model: str, folder: Path) -> Encode:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "model-int8.onnx"
    quantize_dynamic(folder / "model.onnx", path, weight_type=QuantType.QInt8)
    return _onnx_session(model, path)


def _onnx_session(model: str, path: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: array for name, array in inputs.items() if name in taken}
        pooled: np.ndarray = session.run(None, given)[0]
        return pooled

    return _by_batches(model, run)


def _openvino(model: str, folder: Path) -> Encode:
    import openvino

    threads = torch.get_num_threads()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", settings)
    taken = [port.any_name for port in compiled.inputs]

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        pooled: np.ndarray = compiled({name: inputs[name] for name in taken})[0]
        return pooled

    return _by_batches(model, run)


def _by_batches(model: str, run: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Encode:
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


# In this order, since the later ones read the file of the first export.
CONTENDERS: dict[str, Callable[[str, Path], Encode]] = {
    "splade_fast": _splade_fast,
    "sentence-transformers": _sentence_transformers,
    "ONNX Runtime": _onnx_runtime,
    "ONNX Runtime int8": _onnx_runtime_int8,
    "OpenVINO": _openvino,
}
