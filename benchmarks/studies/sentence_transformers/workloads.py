"""Workloads: encoding, gradients and whole training steps, with and without splade_fast.

Both contenders share one transformers model, so that they fit into memory together. The same work
without any head is timed beside them: tokenizer, transformer and optimizer stay as they are, and
bound what an accelerated head can give.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from benchmarks.harness.memory import peak_growth
from benchmarks.inputs.trained_states import bias_for_share, fetched, largest_logits, sample_texts
from examples.docstrings.checkpoint import DEMO
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder
from splade_fast.encoders.threads import submodules
from splade_fast.integrations.sentence_transformers import accelerate
from splade_fast.integrations.sentence_transformers.batches import batches

OURS, THEIRS, BODY = "accelerated", "as it was", "without a head"
WORKS = ("encode", "gradients", "step")

_ACTIVE = 0.01  # share of the pooled entries of the random model, as of a trained one
_QUERY_WORDS = 8


@dataclass(frozen=True)
class Setting:
    """Model, and number and length of the texts that go through it."""

    name: str
    dim: int
    layers: int | None  # layers of a random XLM-R; None: the demo's checkpoint
    documents: int
    batch_size: int  # in encode
    pairs: int  # in a training step
    max_length: int


SETTINGS = {
    "demo": Setting("BERT, 2 layers, V 30,522", 128, None, 64, 32, 16, 256),
    # As large as the demo's checkpoint, mMiniLMv2-L6, and the base model.
    "xlm-roberta-tiny": Setting("XLM-R, 2 layers, V 250,002", 128, 2, 32, 16, 16, 128),
    "xlm-roberta-small": Setting("XLM-R, 6 layers, V 250,002", 384, 6, 32, 16, 16, 128),
    # Four pairs: a step of the model as it was takes 7 s.
    "xlm-roberta": Setting("XLM-R, 12 layers, V 250,002", 768, 12, 16, 8, 4, 128),
}


@dataclass(frozen=True)
class Workload:
    setting: Setting
    dtype: torch.dtype

    def encoders(self) -> dict[str, SparseEncoder]:
        """Make both contenders, around one model."""
        transformer = self._transformer()
        pairs = {name: [copy.copy(transformer), SpladePooling()] for name in (OURS, THEIRS)}
        encoders = {name: SparseEncoder(modules=pair, device="cpu") for name, pair in pairs.items()}
        accelerate(encoders[OURS])
        return encoders

    def runs(self, work: str) -> dict[str, Callable[[], Any]]:
        encoders = self.encoders()
        runs = {name: self.run(work, encoder) for name, encoder in encoders.items()}
        return {**runs, BODY: self.run(work, encoders[OURS], head=False)}

    def run(self, work: str, encoder: SparseEncoder, head: bool = True) -> Callable[[], Any]:
        """Return a function for one round of a work; that of "encode" returns the vectors."""
        if work != "encode":
            return self._training(work, encoder, head)
        texts = sample_texts(self.setting.documents)
        batch_size = self.setting.batch_size
        if head:
            return lambda: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)

        @torch.inference_mode()
        def run_body() -> None:
            encoder.eval()
            for _, features in batches(encoder, submodules(encoder), texts, batch_size, None, {}):
                _hidden(encoder, features)

        return run_body

    def _training(self, work: str, encoder: SparseEncoder, head: bool) -> Callable[[], None]:
        loss = SpladeLoss(
            encoder,
            SparseMultipleNegativesRankingLoss(encoder),
            document_regularizer_weight=1e-4,
            query_regularizer_weight=1e-4,
        )

        def loss_of(columns: list[dict[str, Any]]) -> torch.Tensor:
            if head:
                return torch.stack(list(loss(columns).values())).sum()
            return torch.stack([_hidden(encoder, column).sum() for column in columns]).sum()

        documents = sample_texts(self.setting.pairs)
        queries = [" ".join(text.split()[:_QUERY_WORDS]) for text in documents]
        columns = [dict(encoder.preprocess(texts)) for texts in (queries, documents)]
        # Without a learning rate the model stays what it is, and the work is the same.
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.0, weight_decay=0.0)
        if work == "step":
            for parameter in encoder.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes the optimizer's state

        def run() -> None:
            optimizer.zero_grad()
            encoder.train()
            loss_of([dict(column) for column in columns]).backward()
            if work == "step":
                optimizer.step()

        optimizer.zero_grad()
        return run

    def peak(self, work: str, contender: str, threads: int) -> int:
        """Return the peak in bytes beyond model, gradients and optimizer, in a fresh process."""
        torch.set_num_threads(threads)
        encoder = self.encoders()[contender]
        run = self.run(work, encoder)
        body: Any = encoder.transformers_model
        with torch.no_grad():  # threads and workspaces do not count
            body.base_model(**_model_inputs(encoder, sample_texts(1)))
        growth = peak_growth(run)
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        return max(0, growth - sum(gradient.nbytes for gradient in gradients))

    def _transformer(self) -> Any:
        transformer: Any = Transformer(str(fetched(DEMO)), transformer_task="fill-mask")
        transformer.max_seq_length = self.setting.max_length
        if self.setting.layers is not None:
            transformer.model = _random_model(self.setting.dim, self.setting.layers)
            _set_activity(transformer)
        transformer.model.to(self.dtype)
        return transformer


def _hidden(encoder: SparseEncoder, features: dict[str, Any]) -> torch.Tensor:
    """Return (B, L, D), the input of the head of an accelerated encoder."""
    hidden: torch.Tensor = encoder[0](features)["token_embeddings"]
    return hidden


def _random_model(dim: int, layers: int) -> Any:
    """Make an XLM-R, with 768 and 12 the base model; tokens are those of the demo's tokenizer."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=250_002,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        intermediate_size=4 * dim,
        pad_token_id=0,
        max_position_embeddings=514,
        type_vocab_size=2,
    )
    return XLMRobertaForMaskedLM(config).eval()


@torch.no_grad()
def _set_activity(transformer: Any) -> None:
    """Set the decoder's bias to leave as few entries positive as in a trained model."""
    encoder = SparseEncoder(modules=[transformer, SpladePooling()], device="cpu")
    inputs = _model_inputs(encoder, sample_texts(2))
    decoder = find_decoder(transformer.model)
    hidden = hidden_before_decoder(transformer.model, **inputs)
    largest = largest_logits(hidden, inputs["attention_mask"], decoder.weight)
    decoder.bias.fill_(bias_for_share(largest, _ACTIVE))


def _model_inputs(encoder: SparseEncoder, texts: list[str]) -> dict[str, Any]:
    features = encoder.preprocess(texts)
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
