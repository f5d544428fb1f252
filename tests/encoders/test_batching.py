"""Batches of texts of similar numbers of tokens."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from splade_fast.encoders import batching
from splade_fast.encoders.batching import batches_by_tokens, is_padded_to_longest, longest_first


def make_inputs(tokens, padding_side="right", width=None):
    """Return inputs of rows of the given lengths; the ids of row i are 10 i + 1, 10 i + 2, ..."""
    width = max(tokens) if width is None else width
    columns = torch.arange(width).expand(len(tokens), width)
    lengths = torch.tensor(tokens).unsqueeze(1)
    position = columns if padding_side == "right" else columns - (width - lengths)
    mask = (position >= 0) & (position < lengths)
    ids = (10 * torch.arange(len(tokens)).unsqueeze(1) + position + 1) * mask
    return {"input_ids": ids, "attention_mask": mask.long(), "modality": "text"}


@pytest.mark.parametrize("count", [0, 1, 4, 5, 33])
@pytest.mark.parametrize("characters", [1, 100, 10**9])
def test_longest_first(count, characters, monkeypatch):
    monkeypatch.setattr(batching, "_CHARACTERS", characters)
    lengths = torch.randint(0, 50, (count,)).tolist()
    stretches = list(longest_first(lengths, 4))
    order = torch.cat([torch.empty(0, dtype=torch.int64), *stretches]).tolist()
    assert sorted(order) == list(range(count))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for places in stretches:
        longest = max(lengths[i] for i in places)
        assert len(places) <= 4 or len(places) * longest <= characters
        assert len(places) % 4 == 0 or places is stretches[-1]


def test_longest_first_takes_what_fits(monkeypatch):
    monkeypatch.setattr(batching, "_CHARACTERS", 100)
    assert [len(places) for places in longest_first([30, 30, 10, 10, 1, 1], 2)] == [2, 4]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_is_what_its_texts_alone_would_be(padding_side):
    tokens = [2, 9, 4, 1, 4, 7, 3]
    inputs = make_inputs(tokens, padding_side)
    batches = list(batches_by_tokens(inputs, 3))
    assert [rows.tolist() for rows, _ in batches] == [[1, 5, 2], [4, 6, 0], [3]]
    for rows, batch in batches:
        alone = make_inputs([tokens[i] for i in rows], padding_side)
        assert batch["modality"] == "text"
        assert torch.equal(batch["attention_mask"], alone["attention_mask"])
        shift = 10 * (rows - torch.arange(len(rows))).unsqueeze(1)
        expected = alone["input_ids"] + shift * alone["attention_mask"]
        assert torch.equal(batch["input_ids"], expected)
        assert batch["input_ids"].is_contiguous()


@pytest.mark.parametrize("batch_size", [1, 5, 32])
@pytest.mark.parametrize("longest", [3, 128, 500])
def test_batches_have_little_padding(batch_size, longest):
    tokens = torch.randint(1, longest + 1, (203,)).tolist()
    batches = [
        batch["attention_mask"] for _, batch in batches_by_tokens(make_inputs(tokens), batch_size)
    ]
    assert sorted(int(n) for mask in batches for n in mask.sum(1)) == sorted(tokens)
    for mask, following in pairwise(batches):
        assert 1 <= len(mask) <= batch_size
        assert (mask == 0).sum() <= 40
        # The next text would have been too many, or would have brought too much padding.
        padding = (mask == 0).sum() + mask.shape[1] - following[0].sum()
        assert len(mask) == batch_size or padding > 40


class _OneDevice(TorchDispatchMode):
    """Refuse index_select with indices on another device, as a GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            assert args[0].device == args[2].device
        return func(*args, **(kwargs or {}))


def test_rows_are_taken_where_the_inputs_are():
    inputs = make_inputs([2, 9, 4])
    inputs["input_ids"] = inputs["input_ids"].to("meta")
    with _OneDevice():
        batches = list(batches_by_tokens(inputs, 2))
    assert [batch["input_ids"].shape for _, batch in batches] == [(2, 9), (1, 2)]
    assert {batch["input_ids"].device.type for _, batch in batches} == {"meta"}
    assert {rows.device.type for rows, _ in batches} == {"cpu"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_on_a_gpu():
    inputs = make_inputs([2, 9, 4, 1])
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    pairs = zip(batches_by_tokens(on_gpu, 2), batches_by_tokens(inputs, 2), strict=True)
    for (rows, batch), (expected_rows, expected) in pairs:
        assert torch.equal(rows, expected_rows)
        assert batch["input_ids"].is_cuda
        assert torch.equal(batch["input_ids"].cpu(), expected["input_ids"])


def test_rows_without_tokens_keep_a_column():
    ((rows, first), (_, last)) = batches_by_tokens(make_inputs([0, 3, 0], width=3), 2)
    assert rows.tolist() == [1, 0]
    assert first["input_ids"].tolist() == [[11, 12, 13], [0, 0, 0]]
    assert last["input_ids"].tolist() == [[0]]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (make_inputs([2, 5, 3]), True),
        (make_inputs([2, 5, 3], "left"), True),
        (make_inputs([2, 5, 3], width=8), False),
        ({"input_ids": torch.ones(2, 3)}, False),
        ({**make_inputs([2, 3]), "cu_seq_lens_q": torch.tensor([0, 2, 5])}, False),
        ({**make_inputs([2, 3]), "prompt_length": 1}, True),
    ],
)
def test_what_is_padded_to_the_longest(inputs, expected):
    assert is_padded_to_longest(inputs) == expected
