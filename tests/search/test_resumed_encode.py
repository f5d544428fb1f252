"""encode_corpus with resume, compared with a call that nothing interrupted."""

import os
import re
import signal

import pytest
import torch

import splade_fast as sf
import splade_fast.search.join_files
from splade_fast.search.texts import DataError
from tests.new_process import fork_server
from tests.search.corpora import (
    CHUNK,
    OPTIONS,
    LengthEncoder,
    assert_same_files,
    fail,
    make_texts,
    write_corpus,
)

COUNT = 20  # 4 chunks, of 2, 2, 2 and 1 batches
BATCHES = 7


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.tsv", make_texts(COUNT))


@pytest.fixture
def expected(tmp_path, corpus):
    folder = tmp_path / "expected"
    assert encode(LengthEncoder(), corpus, folder).batches == BATCHES
    return folder


def encode(encoder, corpus, index, **changes):
    options = OPTIONS | {"chunk_size": CHUNK} | changes
    sf.encode_corpus(encoder, corpus, index, **options)
    return encoder


def interrupt(corpus, index, error=None, at=4):
    """Let an encoding fail, by default after two chunks."""
    error = error or OSError("disk full")
    with pytest.raises(type(error)) as raised:
        encode(LengthEncoder(fail(error, at)), corpus, index)
    assert raised.value is error
    assert not index.exists()


def assert_nothing_is_left(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["corpus.tsv", "expected", "index"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_finished_chunks_are_encoded_once(tmp_path, corpus, expected, error):
    index = tmp_path / "index"
    interrupt(corpus, index, error, at=3)
    assert encode(LengthEncoder(), corpus, index, resume=True).batches == BATCHES - 2
    assert_same_files(index, expected)
    assert_nothing_is_left(tmp_path)


def test_a_resumed_encoding_can_be_interrupted_again(tmp_path, corpus, expected):
    index = tmp_path / "index"
    interrupt(corpus, index, at=2)
    with pytest.raises(OSError, match="disk full"):
        encode(LengthEncoder(fail(OSError("disk full"), at=3)), corpus, index, resume=True)
    assert encode(LengthEncoder(), corpus, index, resume=True).batches == BATCHES - 4
    assert_same_files(index, expected)


def test_a_failure_before_the_first_chunk_leaves_nothing(tmp_path, corpus):
    interrupt(corpus, tmp_path / "index", at=1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_without_resume_the_encoding_starts_again(tmp_path, corpus, expected):
    index = tmp_path / "index"
    interrupt(corpus, index)
    assert encode(LengthEncoder(), corpus, index).batches == BATCHES
    assert_same_files(index, expected)
    assert_nothing_is_left(tmp_path)


def test_a_bad_corpus_costs_no_chunks(tmp_path, corpus):
    """The chunks stay until another encoding has begun."""
    interrupt(corpus, tmp_path / "index")
    with pytest.raises(DataError, match="no such file"):
        encode(LengthEncoder(), tmp_path / "missing.tsv", tmp_path / "index")
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == BATCHES - 4


def test_resuming_without_chunks_starts(tmp_path, corpus, expected):
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == BATCHES
    assert_same_files(tmp_path / "index", expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "rows", "content", "partial"])
def test_half_a_chunk_is_encoded_again(tmp_path, corpus, expected, damage):
    index = tmp_path / "index"
    interrupt(corpus, index)
    chunk = tmp_path / ".index.partial" / "0.safetensors"
    content = chunk.read_bytes()
    if damage == "cut":
        chunk.write_bytes(content[:-1])
    elif damage == "empty":
        chunk.write_bytes(b"")
    elif damage == "rows":
        sf.SparseRows.load(chunk)[:-1].save(chunk)
    elif damage == "content":
        chunk.write_bytes(content[:-50] + b"\xff" * 50)
    else:  # left by a killed program
        chunk.rename(chunk.with_name(".0.safetensors.0123.partial"))
    assert encode(LengthEncoder(), corpus, index, resume=True).batches == BATCHES - 2
    assert_same_files(index, expected)
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("calls", [0, 1, 3, 7, 11])
def test_an_interrupted_join_goes_on(tmp_path, corpus, expected, monkeypatch, calls):
    from splade_fast.search.join_files import bytes_of

    index, copied = tmp_path / "index", []

    def fail_after(tensor):
        copied.append(tensor)
        if len(copied) > calls:
            raise OSError("disk full")
        return bytes_of(tensor)

    with monkeypatch.context() as patch:
        patch.setattr("splade_fast.search.join_files.bytes_of", fail_after)
        with pytest.raises(OSError, match="disk full"):
            encode(LengthEncoder(), corpus, index)
    assert not index.exists()
    assert encode(LengthEncoder(), corpus, index, resume=True).batches == 0
    assert_same_files(index, expected)
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("place", ["index._write_description", "chunk_folder.finish_files"])
def test_a_failure_after_the_join_keeps_the_vectors(tmp_path, corpus, expected, monkeypatch, place):
    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(f"splade_fast.search.{place}", full)
        with pytest.raises(OSError, match="disk full"):
            encode(LengthEncoder(), corpus, tmp_path / "index")
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == 0
    assert_same_files(tmp_path / "index", expected)
    assert_nothing_is_left(tmp_path)


def test_a_chunk_that_is_gone_during_the_join(tmp_path, corpus, expected, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("splade_fast.search.join_files._copy", full)
        with pytest.raises(OSError, match="disk full"):
            encode(LengthEncoder(), corpus, tmp_path / "index")
    (tmp_path / ".index.partial" / "3.safetensors").unlink()
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == 1
    assert_same_files(tmp_path / "index", expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 3}, "the k of the chunks in .*index.partial, None, got 3"),
        ({"batch_size": 5}, "the batch_size of .*, 4, got 5"),
        ({"max_length": 15}, "the max_length of .*, 16, got 15"),
        ({"chunk_size": 7}, "the chunk_size of .*, 6, got 7"),
    ],
)
def test_chunks_of_other_settings_are_refused(tmp_path, corpus, changes, message):
    interrupt(corpus, tmp_path / "index")
    with pytest.raises(DataError, match=f"resume must go on with {message}; encode without it"):
        encode(LengthEncoder(), corpus, tmp_path / "index", resume=True, **changes)
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == BATCHES - 4


def test_chunks_of_another_corpus_or_encoder_are_refused(tmp_path, corpus):
    interrupt(corpus, tmp_path / "index")
    content = corpus.read_text()
    corpus.write_text(content.replace("d19\t", "d19\tfox "))
    with pytest.raises(DataError, match="the checksum of the corpus of the chunks"):
        encode(LengthEncoder(), corpus, tmp_path / "index", resume=True)
    corpus.write_text(content + "d20\tfox\n")
    with pytest.raises(DataError, match="the number of texts of the chunks in .*, 20, got 21"):
        encode(LengthEncoder(), corpus, tmp_path / "index", resume=True)
    corpus.write_text(content)
    trained = LengthEncoder()
    torch.nn.init.ones_(trained.anchor)
    with pytest.raises(DataError, match="the encoder's weights of the chunks"):
        encode(trained, corpus, tmp_path / "index", resume=True)
    settings = tmp_path / ".index.partial" / "settings.json"
    stored = settings.read_text()
    settings.write_text("{")
    with pytest.raises(DataError, match=re.escape(f"{settings} is damaged")):
        encode(LengthEncoder(), corpus, tmp_path / "index", resume=True)
    settings.write_text(stored)
    assert encode(LengthEncoder(), corpus, tmp_path / "index", resume=True).batches == BATCHES - 4


def _kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _encode_until_killed(corpus, index, is_joining):
    torch.set_num_threads(1)
    if is_joining:  # after one part
        parts = iter([splade_fast.search.join_files._copy, _kill_itself])
        splade_fast.search.join_files._copy = lambda *arguments: next(parts)(*arguments)
    at_fifth_batch = lambda batch: None if is_joining or batch < 4 else _kill_itself()  # noqa: E731
    encode(LengthEncoder(at_fifth_batch), corpus, index)


@pytest.mark.parametrize("is_joining", [False, True])
def test_a_killed_process(tmp_path, corpus, expected, is_joining):
    context = fork_server()
    arguments = (corpus, tmp_path / "index", is_joining)
    process = context.Process(target=_encode_until_killed, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    encoder = encode(LengthEncoder(), corpus, tmp_path / "index", resume=True)
    assert encoder.batches == (0 if is_joining else BATCHES - 4)
    assert_same_files(tmp_path / "index", expected)
    assert_nothing_is_left(tmp_path)
