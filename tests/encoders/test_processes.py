"""Encoders in forked and spawned processes and in workers of data loaders, with two threads."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from splade_fast.encoders.splade import SpladeEncoder
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs

TEXTS = [" ".join(WORDS[first:]) for first in range(len(WORDS))]
_SECONDS = 120


def encode(encoder, texts=TEXTS):
    return encoder.encode(texts, show_progress=False).to_dense()


def agree(found, expected):
    """Return whether vectors are equal by the defaults of torch.testing.assert_close."""
    return torch.allclose(found, expected, rtol=1.3e-6, atol=1e-5)


def _use_threads():
    """Let torch start its threads: an operation on one element uses one."""
    torch.ones(2**20).exp()


def _encode_in_fork(encoder, expected):
    """Return the status of a forked process that encodes and multiplies."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a process that waits
        is_right = torch.equal(encode(encoder), expected)
        _use_threads()
        os._exit(0 if is_right else 1)
    return os.waitpid(child, 0)[1]


class _Encoded:
    """Dataset of vectors, which each worker encodes itself."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return encode(self.encoder, [TEXTS[index]])[0]


def _run(sender, encoder, expected):
    signal.alarm(_SECONDS)
    _use_threads()
    found = {
        "threads": torch.get_num_threads(),
        "spawned": agree(encode(encoder), expected),
    }
    mine = encode(encoder)
    found["forked"] = _encode_in_fork(encoder, mine)
    found["threads after the fork"] = torch.get_num_threads()
    loader = DataLoader(
        _Encoded(encoder), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    found["workers"] = agree(torch.cat(list(loader)), mine)
    torch.set_num_threads(1)
    found["one thread"] = agree(encode(encoder), mine)
    sender.send(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_processes_of_every_kind_encode(monkeypatch):
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, encoder, encode(encoder)))
    process.start()
    sender.close()
    assert receiver.poll(_SECONDS), "the process waits"
    found = receiver.recv()
    process.join()
    assert found == {
        "threads": 2,
        "spawned": True,
        "forked": 0,
        "threads after the fork": 2,
        "workers": True,
        "one thread": True,
    }
