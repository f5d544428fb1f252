"""Tiny SparseEncoders, as users of sentence-transformers put them together."""

from pathlib import Path

from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

from tests.tiny_models import WORDS, make_tokenizer, masked_lm_configs, save_checkpoint

FAMILIES = masked_lm_configs()
TEXTS = ["quick fox", "", "the lazy dog sleeps under an old tree", "unknownword", "a", "quick fox"]
PROMPTS = {"query": "a quick ", "document": "the "}


def transformer_of(folder: Path, family: str = "bert") -> Transformer:
    folder = folder / family
    if not folder.exists():
        save_checkpoint(FAMILIES[family], folder)
    return Transformer(str(folder), transformer_task="fill-mask")


def splade(folder: Path, family: str = "bert", **pooling) -> SparseEncoder:
    modules = [transformer_of(folder, family), SpladePooling(**pooling)]
    return SparseEncoder(modules=modules, device="cpu", prompts=PROMPTS).eval()


def static_embedding() -> SparseStaticEmbedding:
    tokenizer = make_tokenizer()
    embedding = SparseStaticEmbedding(tokenizer)
    embedding.weight.data.uniform_(-1, 1)  # learned ones may be negative
    return embedding


def inference_free(folder: Path) -> SparseEncoder:
    """Static weights for queries, a transformer for documents."""
    router = Router.for_query_document(
        query_modules=[static_embedding()],
        document_modules=[transformer_of(folder), SpladePooling()],
    )
    return SparseEncoder(modules=[router], device="cpu").eval()


def sentences(count: int) -> list[str]:
    """Texts of different lengths, the same every time."""
    return [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(count)]
