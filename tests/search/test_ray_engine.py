"""encode_corpus on a local Ray with two workers, which die, and with a driver that dies."""

import errno
import multiprocessing
import os
import pickle
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import splade_fast as sf
from splade_fast.export.export_parts import export_parts
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search import ray_engine
from splade_fast.search.part_folder import PartWriter
from splade_fast.search.pieces import DocumentError, PieceEncoder, list_pieces
from splade_fast.search.ray_engine import EngineError, RayEngine
from splade_fast.search.texts import DataError
from tests.search.corpora import (
    CHUNK,
    OPTIONS,
    LengthEncoder,
    assert_same_files,
    make_texts,
    write_corpus,
)
from tests.search.part_files import contents

COUNT = 40
CHUNKS = 7
POISONED = 20  # a text of the fourth chunk
DEADLY = 8  # a text of the second chunk
# A fork server may be older than the cluster, whose token stands in the environment.
SPAWN = multiprocessing.get_context("spawn")


class LoggingEncoder(LengthEncoder):
    """LengthEncoder that logs its texts, refuses one and kills its process at another.

    Args:
        folder: folder of the log.
        poison: text that is refused.
        deadly: text that kills.
        kills_once: whether the text kills no second time.
    """

    def __init__(self, folder, poison="", deadly="", kills_once=True):
        super().__init__()
        self.log, self.struck = folder / "log", folder / "struck"
        self.other_victim = None  # process that dies with this one
        self.poison, self.deadly, self.kills_once = poison, deadly, kills_once

    def tokenize(self, texts, max_length=256, prompt=""):
        with self.log.open("a") as log:
            log.write("".join(f"{text}\n" for text in texts))
        if self.poison in texts:
            raise RuntimeError("poisoned")
        if self.deadly in texts and not (self.kills_once and self.struck.exists()):
            self.struck.touch()
            if self.other_victim is not None:
                os.kill(self.other_victim, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tokenize(texts, max_length, prompt)

    def times(self):
        """Return how often each text was encoded."""
        return Counter(self.log.read_text().splitlines())


def encode(encoder, corpus, index, engine, resume=False, file_format="index"):
    options = OPTIONS | {"chunk_size": CHUNK, "engine": engine, "resume": resume}
    options["file_format"] = file_format
    return sf.encode_corpus(encoder, corpus, index, **options)


@pytest.fixture(scope="module")
def address():
    import ray

    context = ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=2**28, log_to_driver=False
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def texts():
    return {text_id: f"{text_id} {text}" for text_id, text in make_texts(COUNT).items()}


@pytest.fixture
def corpus(tmp_path, texts):
    return write_corpus(tmp_path / "corpus.tsv", texts)


@pytest.fixture
def expected(tmp_path, corpus):
    assert encode(LengthEncoder(), corpus, tmp_path / "expected", "process") == COUNT
    return tmp_path / "expected"


def test_a_worker_dies_and_a_document_is_poisoned(address, tmp_path, corpus, texts, expected):
    poison, deadly = texts[f"d{POISONED}"], texts[f"d{DEADLY}"]
    encoder = LoggingEncoder(tmp_path, poison, deadly)
    message = rf"^document 'd{POISONED}' \(text {POISONED + 1} of the corpus\) .* poisoned$"
    with pytest.raises(DocumentError, match=message):
        encode(encoder, corpus, tmp_path / "index", RayEngine(workers=2, threads=1))
    assert encoder.struck.exists()
    chunks = {path.stem for path in (tmp_path / ".index.partial").glob("*.safetensors")}
    assert chunks == {str(number) for number in range(CHUNKS)} - {str(POISONED // CHUNK)}
    counts = encoder.times()
    for number, text in enumerate(texts.values()):
        if number // CHUNK not in (POISONED // CHUNK, DEADLY // CHUNK):
            assert counts[text] == 1
    assert 1 <= counts[deadly] <= 2
    assert not (tmp_path / "index").exists()

    encoder.log.unlink()
    encoder.poison = ""
    assert encode(encoder, corpus, tmp_path / "index", "process", resume=True) == COUNT
    assert_same_files(tmp_path / "index", expected)
    start = POISONED // CHUNK * CHUNK
    assert encoder.times() == Counter(list(texts.values())[start : start + CHUNK])


def _encode_until_killed(address, corpus, folder):
    save, saved = SparseRows.save, []

    def save_twice(rows, path):
        save(rows, path)
        saved.append(path)
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    SparseRows.save = save_twice
    torch.set_num_threads(1)
    encode(LoggingEncoder(folder), corpus, folder / "index", RayEngine(address, workers=1))


@pytest.mark.exhaustive
def test_a_killed_driver_is_resumed(address, tmp_path, corpus, texts, expected):
    arguments = (address, corpus, tmp_path)
    process = SPAWN.Process(target=_encode_until_killed, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    chunks = {int(path.stem) for path in (tmp_path / ".index.partial").glob("*.safetensors")}
    assert len(chunks) == 2

    encoder = LoggingEncoder(tmp_path)
    encoder.log = tmp_path / "log of the second run"
    engine = RayEngine(threads=1)
    assert encode(encoder, corpus, tmp_path / "index", engine, resume=True) == COUNT
    assert_same_files(tmp_path / "index", expected)
    rest = [text for n, text in enumerate(texts.values()) if n // CHUNK not in chunks]
    assert encoder.times() == Counter(rest)


def test_workers_write_the_files_of_an_export(address, tmp_path, corpus, monkeypatch):
    encode(LengthEncoder(), corpus, tmp_path / "alone", "process", file_format="opensearch")
    monkeypatch.setattr(PartWriter, "write_part", None)  # of this process
    engine = RayEngine(workers=2, threads=1)
    parts = tmp_path / "parts"
    assert encode(LengthEncoder(), corpus, parts, engine, file_format="opensearch") == COUNT
    assert contents(parts) == contents(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


def _encode_parts_until_killed(address, corpus, folder, text):
    torch.set_num_threads(1)
    encoder = LoggingEncoder(folder, deadly=text)
    encoder.other_victim = os.getpid()
    encode(encoder, corpus, folder / "parts", RayEngine(address, workers=1), False, "shards")


@pytest.mark.exhaustive
def test_a_killed_driver_of_parts_is_resumed(address, tmp_path, corpus, texts):
    arguments = (address, corpus, tmp_path, texts[f"d{2 * CHUNK}"])
    process = SPAWN.Process(target=_encode_parts_until_killed, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    finished = {int(path.stem) for path in (tmp_path / ".parts.partial").glob("[0-9]*.json")}
    assert finished == {0, 1}

    encoder = LoggingEncoder(tmp_path)
    encoder.log = tmp_path / "log of the second run"
    engine = RayEngine(threads=1)
    assert encode(encoder, corpus, tmp_path / "parts", engine, True, "shards") == COUNT
    assert encoder.times() == Counter(list(texts.values())[2 * CHUNK :])
    encode(LengthEncoder(), corpus, tmp_path / "expected parts", "process", False, "shards")
    assert contents(tmp_path / "parts") == contents(tmp_path / "expected parts")


@pytest.mark.exhaustive
def test_workers_export_an_index(address, tmp_path, expected):
    options = {"part_size": CHUNK, "show_progress": False}
    export_parts(expected, tmp_path / "alone", "qdrant", **options)
    export_parts(expected, tmp_path / "together", "qdrant", engine="ray", **options)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


@pytest.mark.exhaustive
def test_a_target_that_cannot_be_written(address, tmp_path, corpus, expected, monkeypatch):
    with pytest.raises(NotADirectoryError, match="corpus.tsv"):
        encode(LengthEncoder(), corpus, corpus / "index", "ray")

    def fill(rows, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(SparseRows, "save", fill)
        with pytest.raises(OSError, match="No space left on device"):
            encode(LengthEncoder(), corpus, tmp_path / "index", RayEngine(workers=1, threads=1))
    assert not list(tmp_path.glob("*index*"))


def test_a_cluster_without_room(address, tmp_path, corpus):
    for engine, message in (
        (RayEngine(threads=3), "threads must be at most the number of CPUs of a machine, 2, got 3"),
        (RayEngine(device="cuda"), "device must be 'cpu' on a cluster without GPUs, got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(LengthEncoder(), corpus, tmp_path / "index", engine)
    assert not list(tmp_path.glob("*index*"))


@pytest.mark.exhaustive
def test_a_document_that_always_kills_its_worker(address, tmp_path, corpus, texts, monkeypatch):
    monkeypatch.setattr(ray_engine, "_MOST_RETRIES", 1)
    encoder = LoggingEncoder(tmp_path, deadly=texts[f"d{DEADLY}"], kills_once=False)
    with pytest.raises(
        EngineError, match=r"workers died 2 times at texts 7 to 12 of the corpus, in"
    ):
        encode(encoder, corpus, tmp_path / "index", RayEngine(workers=2, threads=1))
    assert len(list((tmp_path / ".index.partial").glob("*.safetensors"))) == CHUNKS - 1


def test_room_for_workers():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert ray_engine._count_places(nodes, "cpu", 3) == 3
    assert ray_engine._count_places(nodes, "cpu", 7) == 1
    assert ray_engine._count_places(nodes, "cuda", 1) == 2
    with pytest.raises(ValueError, match="a machine, 7, got 8"):
        ray_engine._count_places(nodes, "cpu", 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or None, got 'tpu'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RayEngine(**settings)


def test_unknown_engines_and_a_missing_ray(tmp_path, corpus, monkeypatch):
    with pytest.raises(ValueError, match="engine must be 'process', 'ray' or a RayEngine, got 'x'"):
        encode(LengthEncoder(), corpus, tmp_path / "index", "x")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine 'ray' needs Ray: pip install 'splade_fast\[ray"):
        encode(LengthEncoder(), corpus, tmp_path / "index", "ray")
    assert not list(tmp_path.glob("*index*"))


class StubbornError(ValueError):
    """Error that cannot be pickled, since it takes other arguments than it keeps."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")


def test_errors_of_workers_return():
    error = pickle.loads(ray_engine._pickle_error(DataError("changed")))
    assert type(error) is DataError
    error = pickle.loads(ray_engine._pickle_error(StubbornError(Path("x"), "bad")))
    assert type(error) is EngineError
    assert str(error) == "StubbornError: x: bad"


def test_an_encoder_that_has_read_can_be_sent(corpus):
    pieces, _ = list_pieces(corpus, CHUNK)
    work = PieceEncoder(LengthEncoder(before=print), None, 4, 16)
    rows = work.encode(pieces[-1], lambda count: None)
    assert len(rows) == COUNT % CHUNK
    sent = pickle.loads(pickle.dumps(work))
    again = pickle.loads(pickle.dumps(sent.encode(pieces[-1], lambda count: None)))
    for name in ("indices", "values", "lengths"):
        assert torch.equal(getattr(again, name), getattr(rows, name))
