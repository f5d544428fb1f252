"""encode_corpus, compared with an index saved as a whole."""

import gzip
import json
from pathlib import Path

import pytest
import torch

import splade_fast as sf
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.pieces import DocumentError
from splade_fast.search.texts import DataError
from tests.new_process import fork_server
from tests.search.corpora import (
    CHUNK,
    OPTIONS,
    LengthEncoder,
    assert_same_files,
    make_texts,
    write_corpus,
)
from tests.tiny_models import masked_lm_configs, save_checkpoint


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: the rounding of matrix products depends on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))
    return SpladeEncoder.from_pretrained(folder)


def save_whole(encoder, texts, path, k=None, chunk_size=CHUNK):
    """Save the index of the same chunks from rows that are all in memory."""
    ids, contents = list(texts), list(texts.values())
    options = {name: OPTIONS[name] for name in ("batch_size", "max_length", "show_progress")}
    rows = sf.SparseRows.cat(
        [
            encoder.encode(contents[start : start + chunk_size], k=k, **options)
            for start in range(0, len(contents), chunk_size)
        ]
    )
    fingerprint = Fingerprint.of(encoder, "document", OPTIONS["max_length"])
    meta = IndexMeta(OPTIONS["model"], OPTIONS["max_length"], k, fingerprint=fingerprint)
    Index(rows, ids, meta).save(path)


@pytest.mark.parametrize(
    ("count", "k"),
    [(1, None), (5, None), (6, None), (7, None), (12, None), (25, None), (1, 3), (25, 3)],
)
def test_same_bytes_as_saved_whole(encoder, tmp_path, count, k):
    texts = make_texts(count)
    corpus = write_corpus(tmp_path / "corpus.tsv", texts)
    written = sf.encode_corpus(
        encoder, corpus, tmp_path / "index", k=k, chunk_size=CHUNK, **OPTIONS
    )
    assert written == count
    save_whole(encoder, texts, tmp_path / "expected", k)
    assert_same_files(tmp_path / "index", tmp_path / "expected")
    assert len(Index.load(tmp_path / "index").rows) == count
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["corpus.tsv", "expected", "index"]


def test_one_chunk_is_encode_of_all(encoder, tmp_path):
    texts = make_texts(40)
    corpus = write_corpus(tmp_path / "corpus.tsv", texts)
    sf.encode_corpus(encoder, corpus, tmp_path / "index", **OPTIONS)
    save_whole(encoder, texts, tmp_path / "expected", chunk_size=40)
    assert_same_files(tmp_path / "index", tmp_path / "expected")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.tsv.gz", "corpus.jsonl.gz"])
def test_same_bytes_from_every_kind_of_file(encoder, tmp_path, name):
    texts = {f"{text_id} ü\u2028": text for text_id, text in make_texts(13).items()}
    if "jsonl" in name:
        lines = [json.dumps({"_id": text_id, "text": text}) for text_id, text in texts.items()]
    else:
        lines = [f"{text_id}\t{text}" for text_id, text in texts.items()]
    content = "\n\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    sf.encode_corpus(encoder, tmp_path / name, tmp_path / "index", chunk_size=CHUNK, **OPTIONS)
    save_whole(encoder, texts, tmp_path / "expected")
    assert_same_files(tmp_path / "index", tmp_path / "expected")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "corpus.tsv must hold at least one text, got none"),
        ("\n \n", "corpus.tsv must hold at least one text, got none"),
        ("GOOD d19\tagain\n", "corpus.tsv, line 21: id 'd19' appears a second time"),
        ("GOOD no tab", "corpus.tsv, line 21: expected id<TAB>text, got 'no tab'"),
        ("GOOD x\t\udcff\n", "corpus.tsv, line 21: 'utf-8' codec"),
    ],
)
def test_a_damaged_corpus_leaves_nothing_and_is_not_encoded(tmp_path, content, message):
    good = "".join(f"{text_id}\t{text}\n" for text_id, text in make_texts(20).items())
    corpus = tmp_path / "corpus.tsv"
    corpus.write_bytes(content.replace("GOOD ", good).encode("utf-8", "surrogateescape"))
    encoder = LengthEncoder()
    with pytest.raises(DataError, match=message):
        sf.encode_corpus(encoder, corpus, tmp_path / "index", chunk_size=CHUNK, **OPTIONS)
    assert encoder.batches == 0
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize("change", ["e1\tone more\n", "", None], ids=["longer", "empty", "other"])
def test_a_corpus_that_changes_is_refused(tmp_path, change):
    texts = make_texts(20000)  # more than the file buffer holds
    corpus = write_corpus(tmp_path / "corpus.tsv", texts)

    def before(batch):
        if batch == 0 and change:
            corpus.write_text(corpus.read_text() + change)
        elif batch == 0:
            content = corpus.read_text() if change is None else ""
            corpus.write_text(content.replace("d19999\t", "d19999\tx"))

    with pytest.raises(DataError, match="corpus.tsv must stay as it is .* other texts behind"):
        sf.encode_corpus(LengthEncoder(before), corpus, tmp_path / "index", **OPTIONS)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("name", ["k", "batch_size", "max_length", "chunk_size"])
def test_arguments_out_of_range(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        sf.encode_corpus(
            LengthEncoder(), tmp_path / "missing.tsv", tmp_path / "index", **(OPTIONS | {name: 0})
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused(tmp_path, value):
    class DamagedEncoder(LengthEncoder):
        def sparse_rows(self, inputs, k):
            rows = super().sparse_rows(inputs, k)
            rows.values[inputs["lengths"][:, 0] == 7, -1] = value
            return rows

    corpus = write_corpus(
        tmp_path / "corpus.tsv", {f"d{i}": "fox" + "x" * (i == 9) * 4 for i in range(12)}
    )
    message = r"finite weights, got NaN or infinity for document 'd9' \(text 10 of the corpus\)"
    with pytest.raises(DocumentError, match=message):
        sf.encode_corpus(DamagedEncoder(), corpus, tmp_path / "index", chunk_size=6, **OPTIONS)
    assert not (tmp_path / "index").exists()


def test_an_index_that_exists_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.tsv", make_texts(2))
    (tmp_path / "index").mkdir()
    with pytest.raises(FileExistsError, match="index must not exist yet"):
        sf.encode_corpus(LengthEncoder(), corpus, tmp_path / "index", **OPTIONS)
    assert list((tmp_path / "index").iterdir()) == []


def _encode_and_tell_peak(corpus: Path, index: Path, queue) -> None:
    torch.set_num_threads(1)
    sf.encode_corpus(LengthEncoder(width=4096), corpus, index, chunk_size=64, **OPTIONS)
    status = Path("/proc/self/status").read_text()
    queue.put(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Fresh processes have the same peak for small and large corpora."""
    context = fork_server()
    peaks, sizes = [], []
    for count in (512, 4096):
        corpus = tmp_path / f"{count}.tsv"
        with corpus.open("w") as file:
            file.writelines(f"d{i}\t{'fox ' * 2500}\n" for i in range(count))
        queue = context.Queue()
        index = tmp_path / f"index-{count}"
        process = context.Process(target=_encode_and_tell_peak, args=(corpus, index, queue))
        process.start()
        peaks.append(queue.get(timeout=120))
        process.join()
        sizes.append((index / "vectors.safetensors").stat().st_size)
    vectors, texts = sizes[1] - sizes[0], (4096 - 512) * 10_000
    assert vectors > 100 * 2**20
    assert texts > 30 * 2**20
    assert peaks[1] - peaks[0] < texts / 2
