"""Heads, accelerated models and encoders in one's own loop, sharded by FSDP2."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import splade_fast as sf
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.head import screening
from splade_fast.training import cached_encode
from tests.adapters import with_adapters
from tests.ranks import run_ranks
from tests.tiny_models import causal_lm_configs, make_model, make_tokenizer, masked_lm_configs
from tests.training.models import texts

ROWS = 8
STEPS = 2


class Tagger(nn.Module):
    """One's own model: a layer between an embedding and a head, which may share the embedding."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.layer = nn.Linear(8, 8)
        decoder = nn.Linear(8, 30)
        if is_tied:
            decoder.weight = self.embedding.weight
        self.head = sf.SpladeHead(decoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(input_ids))), attention_mask)


def encoder_of(family):
    model = make_model((masked_lm_configs() | causal_lm_configs())[family])
    return SpladeEncoder(model, make_tokenizer())


def adapted_encoder():
    return with_adapters(encoder_of("bert"), "get_peft_model").eval()


def encode_by_mini_batches(model, inputs):
    return cached_encode(model, inputs, 1)


def encode_by_tokens(model, inputs):
    return cached_encode(model, inputs, mini_batch_tokens=12)  # more mini-batches on one rank


def encode_at_once(model, inputs):
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.pooled


# Model, and the function that encodes with it.
LOOPS = {
    "head": (lambda: Tagger(is_tied=False), encode_at_once),
    "tied head": (lambda: Tagger(is_tied=True), encode_at_once),
    "accelerated": (lambda: sf.accelerate(encoder_of("bert").model), encode_at_once),
    "accelerated untied": (lambda: sf.accelerate(encoder_of("llama").model), encode_at_once),
    "encoder": (lambda: encoder_of("modernbert"), encode_at_once),
    "GradCache": (lambda: encoder_of("bert"), encode_by_mini_batches),
    "GradCache by tokens": (lambda: encoder_of("bert"), encode_by_tokens),
    "adapters": (adapted_encoder, encode_by_mini_batches),
}


def shard(model):
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    for layer in lists[0] if lists else [model.layer]:
        fully_shard(layer)
    return fully_shard(model)


def train(model, encode, rank=0, count=1):
    """Train on the rows of a rank, with two forwards for a backward; return what tests compare."""
    inputs = make_tokenizer()(texts(ROWS, seed=1), padding=True, return_tensors="pt")
    mine = torch.arange(ROWS).chunk(count)[rank]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
    found = {}
    for step in range(STEPS):
        vectors = [encode(model, {n: x[rows] for n, x in inputs.items()}) for rows in mine.chunk(2)]
        targets = torch.arange(1.0, vectors[0].shape[1] + 1).sin()
        (torch.cat(vectors) - targets).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        found[f"norm-{step}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found[f"vectors-{step}"] = encode_at_once(model, inputs)
    return found


def loops_are_those_of_one_process(rank, count, folder):
    for name, (make, encode) in LOOPS.items():
        found = train(shard(make()), encode, rank, count)
        expected = torch.load(folder / f"{name}.pt")
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")


def encoders_encode_and_save(rank, folder):
    whole, encoder = encoder_of("bert"), shard(encoder_of("bert"))
    lines = texts(5, seed=2)
    expected = whole.encode(lines, k=4, batch_size=2, show_progress=False)
    for _ in range(2):
        rows = encoder.encode(lines, k=4, batch_size=2, show_progress=False)
        assert torch.equal(rows.to_dense(), expected.to_dense())
    encoder(**encoder.tokenize(lines)).sum().backward()  # after weights gathered for encoding
    assert all(p.grad is not None for p in encoder.model.bert.encoder.parameters())
    encoder.save_pretrained(folder / "sharded")
    assert isinstance(encoder.model.get_output_embeddings().weight, DTensor)
    if rank == 0:
        whole.save_pretrained(folder / "whole")
        for file in sorted(folder.glob("whole/**/*")):
            if file.is_file():
                copy = folder / "sharded" / file.relative_to(folder / "whole")
                assert copy.read_bytes() == file.read_bytes(), file


def screening_sees_every_change(rank):
    """FSDP2 gathers changed weights into the tensor of before, whose version stays the same.

    The weight has entries that the sample of `screening` skips, and one of them changes.
    """
    torch.manual_seed(0)
    dim = 64
    decoder = nn.Linear(dim, 4 * screening._SAMPLED_ENTRIES // dim, bias=False)
    head = fully_shard(sf.SpladeHead(decoder, algorithm="screened"))
    hidden = torch.randn(2, 600, dim)  # enough tokens for screening in training
    before = None
    for step in range(3):
        pooled = head(hidden)
        gathered = head.weight
        dense = sf.splade_head(hidden, gathered, algorithm="dense")
        assert torch.equal(pooled, dense), step
        versions = gathered._version, gathered.untyped_storage()._cdata
        if step:
            assert versions == before
        before = versions
        pooled.sum().backward()
        with torch.no_grad():
            if rank == 0:
                head.weight.to_local()[0, 1] += 50.0
    assert isinstance(head, FSDPModule)


def errors_say_what_to_do():
    encoder = shard(encoder_of("bert"))
    head = shard(Tagger(is_tied=False)).head
    with pytest.raises(ValueError, match="weight must be whole, got a shard"):
        head(torch.zeros(1, 2, 8))
    for function in (sf.accelerate, lambda model: SpladeEncoder(model, make_tokenizer())):
        with pytest.raises(ValueError, match=re.escape("before fully_shard")):
            function(encoder.model)


def _run_rank(rank, count, folder):
    loops_are_those_of_one_process(rank, count, folder)
    encoders_encode_and_save(rank, folder)
    screening_sees_every_change(rank)
    errors_say_what_to_do()


def test_two_ranks(tmp_path):
    for name, (make, encode) in LOOPS.items():
        torch.save(train(make(), encode), tmp_path / f"{name}.pt")
    run_ranks(2, _run_rank, tmp_path, tmp_path)
