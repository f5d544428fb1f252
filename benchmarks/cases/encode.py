"""Token ids to the k largest entries of each document: a whole masked language model and its head.

The model has BERT's architecture and random weights, so that nothing is downloaded. Its decoder
bias leaves as many entries positive as in a trained SPLADE model. Documents have ragged lengths;
a batch holds similar ones. The peer is the model with the pooling module of sentence-transformers,
then torch.topk. The demo measures a real checkpoint, tokenizing included.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.inputs.batches import ragged_lengths, right_padding, seeded, shift_for_active_share
from benchmarks.inputs.peer import PeerPool
from splade_fast import reference
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder

_ACTIVE = 0.01  # share of the vocabulary

Batch = tuple[Tensor, Tensor]  # input_ids and attention_mask


def _ours(model: BertForMaskedLM, batches: Sequence[Batch], *, k: int) -> Tensor:
    decoder = find_decoder(model)
    parts = []
    for input_ids, mask in batches:
        hidden = hidden_before_decoder(model, input_ids=input_ids, attention_mask=mask)
        parts.append(splade_fast.splade_head_topk(hidden, decoder.weight, decoder.bias, mask, k=k))
    values = splade_fast.SparseRows.cat(parts).values
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]))
    return padded.sort(dim=1, descending=True)[0]


def _pooled_by(pool: Callable[[Tensor, Tensor], Tensor]) -> Implementation:
    def encode(model: BertForMaskedLM, batches: Sequence[Batch], *, k: int) -> Tensor:
        return torch.cat(
            [
                pool(model(input_ids=ids, attention_mask=mask).logits, mask).topk(k, dim=1)[0]
                for ids, mask in batches
            ]
        )

    return encode


@dataclass(frozen=True, kw_only=True)
class EncodeCase(Case):
    op: ClassVar[str] = "encode"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_pooled_by(reference.splade_pool))

    documents: int
    batch: int
    length: int
    layers: int
    dim: int
    k: int = 256
    vocab: int = 30522
    mean_fill: float = 0.65

    @property
    def shape(self) -> str:
        sizes = f"N{self.documents} B{self.batch} L{self.length} D{self.dim} V{self.vocab}"
        return f"{sizes} k{self.k} {self.layers} layers"

    @property
    def layout(self) -> str:
        return "padded"

    @property
    def fill(self) -> float:
        """Share of real tokens, with each batch padded to its longest document."""
        return self.lengths().sum().item() / sum(ids.numel() for ids, _ in self.batches())

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target("times faster than peer", 3),)

    def tiny(self) -> "EncodeCase":
        return dataclasses.replace(
            self, documents=6, batch=3, length=16, layers=1, dim=32, vocab=500, k=20
        )

    def peer(self) -> Implementation:
        return _pooled_by(PeerPool(self.direction))

    def lengths(self) -> Tensor:
        found = ragged_lengths(self.documents, self.length, self.mean_fill)
        return found.sort(descending=True)[0]

    def batches(self) -> list[Batch]:
        generator = seeded("cpu")
        found = []
        for lengths in self.lengths().split(self.batch):
            longest = int(lengths.max())
            ids = torch.randint(self.vocab, (len(lengths), longest), generator=generator)
            found.append((ids.to(self.device), right_padding(lengths, longest, self.device)))
        return found

    def model(self, batches: Sequence[Batch]) -> BertForMaskedLM:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocab,
            hidden_size=self.dim,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.dim // 64),
            intermediate_size=4 * self.dim,
            max_position_embeddings=self.length,
        )
        untyped: Any = BertForMaskedLM(config)
        model: BertForMaskedLM = untyped.to(self.device, self.dtype).eval()
        ids, mask = batches[-1]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
            pooled = logits.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)
            find_decoder(model).bias.fill_(shift_for_active_share(pooled, _ACTIVE))
        return model

    def build(self, *, floors: bool = True) -> Workload:
        batches = self.batches()
        model = self.model(batches)
        return Workload(
            arguments=(model, batches),
            options={"k": self.k},
            leaves={},
            upstream=torch.empty(0),
            exact=lambda: self._exact(model, batches),
            floors={"model without its head": lambda: _hidden(model, batches)} if floors else {},
        )

    @torch.no_grad()
    def _exact(self, model: BertForMaskedLM, batches: Sequence[Batch]) -> dict[str, Tensor]:
        return {"output": type(self).eager(copy.deepcopy(model).double(), batches, k=self.k)}


@torch.no_grad()
def _hidden(model: BertForMaskedLM, batches: Sequence[Batch]) -> None:
    for input_ids, mask in batches:
        hidden_before_decoder(model, input_ids=input_ids, attention_mask=mask)


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[EncodeCase]:
    sizes: dict[str, Any] = {"documents": 128, "batch": 32, "length": 256, "layers": 2, "dim": 128}
    if device == "cuda":
        sizes = {"documents": 1024, "batch": 128, "length": 256, "layers": 12, "dim": 768}
    base = EncodeCase(direction="forward", dtype=dtypes[0], device=device, **sizes)
    return [base.tiny()] if quick else [base]
