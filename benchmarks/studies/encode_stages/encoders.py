"""Models of three sizes, each as a SpladeEncoder and as an accelerated SparseEncoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import splade_fast as sf
from benchmarks.inputs.batches import shift_for_active_share
from benchmarks.inputs.trained_states import fetched
from examples.docstrings.checkpoint import DEMO
from splade_fast.encoders.hidden_states import find_decoder

_ACTIVE = 0.01  # share of the vocabulary
_SAMPLE = 8  # texts that the bias is chosen by


@dataclass(frozen=True)
class Size:
    """Size of a model, and the number of documents to encode; layers 0: the checkpoint."""

    name: str
    documents: int
    layers: int = 0
    dim: int = 0


SIZES = (
    Size("checkpoint, 2 layers D 128", 200),
    Size("6 layers D 384", 64, 6, 384),
    Size("12 layers D 768", 32, 12, 768),
)


def model_folder() -> str:
    return str(fetched(DEMO))


def load(size: Size, texts: Sequence[str]) -> sf.SpladeEncoder:
    """Return an encoder; random weights get a bias that leaves entries as a trained model does."""
    if not size.layers:
        return sf.SpladeEncoder.from_pretrained(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.dim // 64,
        intermediate_size=4 * size.dim,
    )
    untyped: Any = BertForMaskedLM(config)
    encoder = sf.SpladeEncoder(untyped.eval(), tokenizer)
    inputs = encoder.tokenize(list(texts[:_SAMPLE]), max_length=64)
    with torch.no_grad():
        logits = untyped(**inputs).logits
        pooled = logits.masked_fill(inputs["attention_mask"][:, :, None] == 0, -torch.inf).amax(1)
        find_decoder(untyped).bias.fill_(shift_for_active_share(pooled, _ACTIVE))
    return encoder


def _by_encoder(encoder: sf.SpladeEncoder) -> Callable[[list[str], int, int], object]:
    return lambda texts, batch_size, max_length: encoder.encode(
        texts, batch_size=batch_size, max_length=max_length, show_progress=False
    )


def _by_sparse_encoder(encoder: sf.SpladeEncoder) -> Callable[[list[str], int, int], object]:
    import tempfile

    from sentence_transformers import SparseEncoder

    from splade_fast.integrations.sentence_transformers import accelerate

    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        theirs: Any = accelerate(SparseEncoder(folder, device="cpu"))

    def encode(texts: list[str], batch_size: int, max_length: int) -> object:
        theirs.max_seq_length = max_length
        return theirs.encode(texts, batch_size=batch_size, show_progress_bar=False)

    return encode


ENCODERS = {"SpladeEncoder": _by_encoder, "accelerate(SparseEncoder)": _by_sparse_encoder}
