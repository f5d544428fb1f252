"""Small corpora, and a quick encoder that fails when a test wants it to."""

import random

import torch

import splade_fast as sf
from splade_fast.encoders.text_encoder import TextEncoder
from tests.tiny_models import WORDS, make_tokenizer

CHUNK = 6
OPTIONS = {"model": "name/of-a-model", "batch_size": 4, "max_length": 16, "show_progress": False}


def make_texts(count, seed=0):
    draw = random.Random(seed)
    return {f"d{i}": " ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for i in range(count)}


def write_corpus(path, texts):
    path.write_text("".join(f"{text_id}\t{text}\n" for text_id, text in texts.items()))
    return path


def assert_same_files(actual, expected):
    mine, theirs = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (actual, expected))
    assert mine == theirs
    assert len(mine) == 3


class LengthEncoder(TextEncoder):
    """Quick encoder: every vector has `width` entries of the text's length.

    Args:
        before: function that is called with the number of each batch before it is encoded.
        width: number of entries of every vector.
    """

    def __init__(self, before=lambda batch: None, width=8):
        super().__init__(make_tokenizer())
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.before = before
        self.width = width
        self.batches = 0

    vocab_size = property(lambda self: max(64, self.width))
    dtype = torch.float32

    def tokenize(self, texts, max_length=256, prompt=""):
        lengths = torch.tensor([[len(prompt + text)] for text in texts])
        return {"lengths": lengths, "attention_mask": torch.ones_like(lengths)}

    def sparse_rows(self, inputs, k):
        self.before(self.batches)
        self.batches += 1
        count = len(inputs["lengths"])
        indices = torch.arange(self.width, dtype=torch.int32).repeat(count, 1)
        values = inputs["lengths"].float().repeat(1, self.width)
        lengths = torch.full((count,), self.width, dtype=torch.int32)
        return sf.SparseRows(indices, values, lengths, self.vocab_size)


def fail(error, at):
    def before(batch):
        if batch == at:
            raise error

    return before
