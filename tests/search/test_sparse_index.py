"""SparseIndex finds what sparse_search finds, to the bit."""

import contextlib
import functools
import os
import random
import re
import resource
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import splade_fast as sf
from splade_fast.ops.sparse_rows.file import read_file, write_file
from splade_fast.search.sparse_index import order, sparse_index
from splade_fast.search.sparse_index.sparse_index import _FILE
from tests.new_process import call_in_new_process, fork_server
from tests.ops.inputs import DTYPES
from tests.ops.instruction_sets import assert_pass_with, instruction_sets_here
from tests.selection import ALL

ISAS = ("portable", "avx2")  # have kernels of the index; other tests run with those of AVX-512
SEEDS = {"few": range(100), "many": range(100, 700), "more": range(700, 1300)}
if os.environ.get(ALL):
    SEEDS |= {f"up to {end}": range(end - 1450, end) for end in range(2750, 10_001, 1450)}
KINDS = ("plain", "equal", "huge", "tiny", "wide")


def draw_rows(generator, count, cols, dtype, kind):
    """Return rows of any density, some with zero weights, as `kind` of values says."""
    shape = (count, cols)
    dense = torch.rand(shape, generator=generator, dtype=torch.float64)
    dense *= torch.rand(shape, generator=generator) < torch.rand(1, generator=generator)
    if kind == "equal":
        dense = (dense * 3).ceil()
    elif kind == "huge":
        dense *= torch.finfo(dtype).max
    elif kind == "tiny":
        dense *= torch.finfo(dtype).tiny  # most are denormal
    elif kind == "wide":
        dense *= 2.0 ** torch.randint(-20, 15, shape, generator=generator)
    dense = dense.to(dtype).nan_to_num(posinf=torch.finfo(dtype).max)
    rows = sf.SparseRows.from_dense(dense)
    rows.values[torch.rand(rows.values.shape, generator=generator) < 0.1] = 0
    return rows


def draw_case(seed):
    """Return queries, documents and k; few columns give documents that are equal."""
    draws, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = draws.choice([0, 1, 2, 5, 31, 32, 33, 100, 513, 1100])
    cols = draws.choice([1, 2, 5] if count > 33 else [1, 5, 40])
    docs, queries = (
        draw_rows(generator, rows, cols, draws.choice(DTYPES), draws.choice(KINDS))
        for rows in (count, draws.choice([0, 1, 3]))
    )
    is_dense = draws.random() < 0.3
    k = draws.choice([1, 2, 10, max(count // 2, 1), count + 1])
    return queries.to_dense() if is_dense else queries, docs, k


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def build(docs):
    return sf.SparseIndex.build(docs, show_progress=False)


def search(index, queries, k, *, min_score=None, allowed=None):
    """Return the result of a search, which is that of both algorithms."""
    found = index.search(queries, k, min_score=min_score, allowed=allowed)
    for algorithm in ("blocks", "accumulators"):
        assert_same(index._search(queries, k, min_score, allowed, algorithm), found)
    return found


def filtered_search(queries, docs, k, min_score, allowed):
    """Return what a filtered search has to return, from a full ranking in the score's dtype."""
    scores, ids = sf.sparse_search(queries, docs, max(len(docs), 1))
    places = min(k, len(docs))
    kept_scores = torch.full((len(ids), places), -torch.inf, dtype=scores.dtype)
    kept_ids = torch.full((len(ids), places), -1)
    for row in range(len(ids)):
        kept = torch.isin(ids[row], allowed) & (scores[row] >= min_score)
        count = min(int(kept.sum()), places)
        kept_scores[row, :count] = scores[row][kept][:count]
        kept_ids[row, :count] = ids[row][kept][:count]
    return kept_scores, kept_ids


@pytest.mark.parametrize("seeds", SEEDS.values(), ids=SEEDS)
def test_random_corpora(seeds):
    for seed in seeds:
        queries, docs, k = draw_case(seed)
        assert_same(search(build(docs), queries, k), sf.sparse_search(queries, docs, k))


@pytest.mark.parametrize("weight", [0.0, 1e-44, 3e38])
def test_many_equal_documents(weight):
    """They have no order of similarity, and scores of 0 or inf are ties."""
    docs = sf.SparseRows.from_dicts([{0: weight, 2: weight}] * 600, num_cols=3)
    queries = torch.tensor([[1.0, 0.0, 1.0], [3e38, 0.0, 1.0]])
    assert_same(build(docs).search(queries, 20), sf.sparse_search(queries, docs, 20))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in instruction_sets_here()])
def test_lesser_instruction_sets(isa):
    assert_pass_with(isa, __file__, "test_random_corpora and few")


def test_filters():
    for seed in range(300):
        queries, docs, k = draw_case(seed)
        # Filters compare scores before rounding, so documents and scores share a dtype here.
        queries, docs = queries.to(dtype=torch.float64), docs.to(dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(docs), generator=generator) < torch.rand(1, generator=generator)
        ids = mask.nonzero().flatten()
        some_score = sf.sparse_scores(queries, docs).flatten()[:1]
        min_score = float(some_score) if len(some_score) else 0.0
        everything, no_limit = torch.arange(len(docs)), -torch.inf
        index = build(docs)
        for arguments, expected in (
            ({"allowed": mask}, (no_limit, ids)),
            ({"allowed": ids.flip(0).tolist()}, (no_limit, ids)),
            ({"min_score": min_score}, (min_score, everything)),
            ({"min_score": min_score, "allowed": ids}, (min_score, ids)),
        ):
            found = search(index, queries, k, **arguments)
            assert_same(found, filtered_search(queries, docs, k, *expected))


def test_a_large_corpus_is_pruned():
    """Groups, blocks and rounds of bounds take part; equal documents are far from each other."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.rand(50, 300, generator=generator).pow(20)
    docs = topics[torch.randint(50, (6000,), generator=generator)]
    docs = docs * (torch.rand(docs.shape, generator=generator) < 0.2)
    docs[3000:] = docs[:3000]
    docs, queries = sf.SparseRows.from_dense(docs), sf.SparseRows.from_dense(topics[:9], k=20)
    index = build(docs)
    for k in (1, 10, 1000, 6000):
        assert_same(search(index, queries, k), sf.sparse_search(queries, docs, k))


def test_threads():
    queries, docs, _ = (
        draw_rows(torch.Generator().manual_seed(n), n, 30, torch.float32, "plain")
        for n in (40, 700, 1)
    )
    index, before = build(docs), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = index.search(queries, 7)
        torch.set_num_threads(3)
        assert_same(index.search(queries, 7), alone)
    finally:
        torch.set_num_threads(before)
    assert_same(alone, sf.sparse_search(queries, docs, 7))
    assert_same(index.search(queries[5:6], 7), (alone[0][5:6], alone[1][5:6]))


def test_a_query_alone_is_searched_by_several_threads():
    """Each thread has a range of 64 groups at least; equal documents are in different ranges."""
    dense = torch.rand(50_000, 30, generator=torch.Generator().manual_seed(0))
    dense[25_000:] = dense[:25_000]
    docs = sf.SparseRows.from_dense(dense.where(dense > 0.9, 0.0))
    queries = sf.SparseRows.from_dense(dense[:3], k=5)
    index, before = build(docs), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for k in (1, 10, 3000):
            assert_same(search(index, queries[:1], k), sf.sparse_search(queries[:1], docs, k))
        torch.set_num_threads(6)  # two for each query
        found = search(index, queries, 10, min_score=1.5, allowed=range(0, 50_000, 3))
    finally:
        torch.set_num_threads(before)
    expected = filtered_search(queries, docs, 10, 1.5, torch.arange(0, 50_000, 3))
    assert_same(found, expected)


def test_denormal_numbers_that_count_as_zero():
    docs = sf.SparseRows.from_dicts([{0: 1.0}, {1: 1e-40}, {1: 2.0}] * 3, num_cols=2)
    queries = torch.tensor([[1e-3, 1.0]])
    index = build(docs)
    assert torch.set_flush_denormal(True)
    try:
        found = search(index, queries, 9)
    finally:
        torch.set_flush_denormal(False)
    assert found[1].tolist() == [[2, 5, 8, 0, 3, 6, 1, 4, 7]]
    assert_same(index.search(queries, 9), sf.sparse_search(queries, docs, 9))


def test_repeated_columns_of_a_query_add_up():
    docs = sf.SparseRows.from_dicts([{0: 1.5, 2: 2.0}, {2: 3.0}], num_cols=3)
    columns = torch.tensor([[2, 0, 2]], dtype=torch.int32)
    lengths = torch.tensor([3], dtype=torch.int32)
    queries = sf.SparseRows(columns, torch.tensor([[1.0, 4.0, 0.5]]), lengths, 3)
    assert_same(build(docs).search(queries, 2), sf.sparse_search(queries, docs, 2))


@pytest.fixture
def docs():
    return sf.SparseRows.from_dicts([{0: 1.0, 2: 2.0}, {}, {1: 3.0}, {0: 0.5}], num_cols=4)


def test_description(docs):
    index = build(docs)
    assert (len(index), index.num_cols) == (4, 4)
    assert repr(index) == "SparseIndex(4 documents, num_cols=4, dtype=torch.float32)"


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_values_without_bounds_are_refused(docs, value):
    index = build(docs)
    queries = torch.tensor([[0.0, value, 0.0, 1.0]])
    with pytest.raises(
        RuntimeError, match="queries must be finite and at least 0, got .* in row 0"
    ):
        index.search(queries, 1)
    docs.values[2, 0] = value
    with pytest.raises(RuntimeError, match="values must be finite and at least 0, got .* in row 2"):
        build(docs)


def test_rows_that_are_not_sparse_rows_are_refused(docs):
    with pytest.raises(TypeError, match="rows must be SparseRows, got Tensor"):
        sf.SparseIndex.build(docs.to_dense())
    docs.indices[0, 1] = 0
    with pytest.raises(RuntimeError, match="indices must ascend .* got 0 after 0 in row 0"):
        build(docs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1, "min_score": float("nan")}, ValueError, "min_score must be a number, got nan"),
        ({"k": 1, "allowed": [4]}, ValueError, "allowed must hold ids from 0 to 3, got 4"),
        ({"k": 1, "allowed": [-1]}, ValueError, "allowed must hold ids from 0 to 3, got -1"),
        ({"k": 1, "allowed": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask \(4,\), got"),
        ({"k": 1, "allowed": [0.5]}, TypeError, "allowed must be a mask of bool or a list of ids"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(docs, arguments, error, message):
    with pytest.raises(error, match=message):
        build(docs).search(docs, **arguments)


def test_queries_of_other_columns_are_refused(docs):
    with pytest.raises(ValueError, match=r"queries must have index.num_cols = 4 columns, got 3"):
        build(docs).search(torch.ones(1, 3), 1)


def test_no_document_is_allowed(docs):
    scores, ids = build(docs).search(docs, 2, allowed=[])
    assert scores.eq(-torch.inf).all()
    assert ids.eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_files(tmp_path, docs, dtype):
    docs = docs.to(dtype=dtype)
    path = tmp_path / "docs.index"
    build(docs).save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = sf.SparseIndex.load(path)
    assert loaded.dtype == dtype
    assert_same(loaded.search(docs, 4), sf.sparse_search(docs, docs, 4))
    loaded.save(path)  # over the file that is mapped
    assert_same(loaded.search(docs, 4), sf.sparse_search(docs, docs, 4))


def test_failed_save_leaves_the_old_file(tmp_path, docs, monkeypatch):
    path = tmp_path / "docs.index"
    build(docs).save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("splade_fast.ops.sparse_rows.file.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        build(docs[:1]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def draw_alike(count, dtype):
    """Return rows of which many are alike."""
    generator = torch.Generator().manual_seed(count)
    topics = torch.rand(40, 60, generator=generator).pow(8)
    dense = topics[torch.randint(40, (count,), generator=generator)]
    dense = dense * (torch.rand(dense.shape, generator=generator) < 0.3)
    return sf.SparseRows.from_dense(dense.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 300, 2000])
def test_a_build_in_a_file(tmp_path, monkeypatch, count, dtype):
    """It gives the same bytes as one in memory, also where the documents are ordered by parts."""
    monkeypatch.setattr(order, "_PART_ROWS", 512)
    docs = draw_alike(count, dtype)
    docs.save(tmp_path / "rows")
    build(docs).save(tmp_path / "expected")
    path = tmp_path / "docs.index"
    for _ in range(2):  # a new file, and over an existing one
        mapped = sf.SparseRows.load(tmp_path / "rows")
        index = sf.SparseIndex.build(mapped, path=path, show_progress=False)
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert_same(index.search(docs[:3], 9), sf.sparse_search(docs[:3], docs, 9))
    assert_same(sf.SparseIndex.load(path).search(docs[:3], 9), index.search(docs[:3], 9))
    assert {file.name for file in tmp_path.iterdir()} == {"rows", "expected", "docs.index"}


@pytest.mark.parametrize("value", [0.0, torch.finfo(torch.float32).tiny, 3e38])
def test_parts_of_documents_that_are_all_equal(monkeypatch, value):
    monkeypatch.setattr(order, "_PART_ROWS", 256)
    docs = sf.SparseRows.from_dicts([{0: value, 2: value}] * 600, num_cols=3)
    queries = torch.tensor([[1.0, 0.0, 1.0]])
    assert_same(build(docs).search(queries, 20), sf.sparse_search(queries, docs, 20))


def _build_with_little_memory(rows_path, path, more_bytes):
    order._PART_ROWS, order._ENTRIES_AT_ONCE, order._SAMPLED_ROWS = 2**11, 2**14, 2**9
    rows = sf.SparseRows.load(rows_path)
    sf.SparseIndex.build(rows[:4096], show_progress=False)  # torch keeps memory of its own
    with open("/proc/self/status") as status:
        [kilobytes] = [int(line.split()[1]) for line in status if line.startswith("VmData:")]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    load = sf.SparseIndex.load

    def load_without_limit(*arguments, **options):
        # The limit would count the finished file, which is mapped such that a write copies a page.
        resource.setrlimit(resource.RLIMIT_DATA, before)
        return load(*arguments, **options)

    sf.SparseIndex.load = load_without_limit
    resource.setrlimit(resource.RLIMIT_DATA, (kilobytes * 1024 + more_bytes, before[1]))
    try:
        return len(sf.SparseIndex.build(rows, path=path, show_progress=False))
    except (MemoryError, RuntimeError) as error:
        return f"{error}"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit of data alone")
def test_a_build_in_a_file_needs_little_memory(tmp_path):
    """Rows, index and points of the documents have 14 times the memory that is allowed."""
    docs = draw_alike(60_000, torch.float32)
    docs.save(tmp_path / "rows")
    path, more_bytes = tmp_path / "docs.index", 2**21
    assert (tmp_path / "rows").stat().st_size > 7 * more_bytes
    build_in = functools.partial(
        call_in_new_process, _build_with_little_memory, tmp_path / "rows", environment={}
    )
    assert build_in(path, more_bytes) == len(docs)
    assert "memory" in build_in(None, more_bytes)
    assert_same(sf.SparseIndex.load(path).search(docs[:3], 9), sf.sparse_search(docs[:3], docs, 9))


def _build_and_die(rows, path):
    sparse_index._Build.fill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    sf.SparseIndex.build(rows, path=path, show_progress=False)


def test_a_killed_build_leaves_nothing_behind(tmp_path):
    docs = draw_alike(600, torch.float32)
    process = fork_server().Process(target=_build_and_die, args=(docs, tmp_path / "docs.index"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_old_file(tmp_path, docs, monkeypatch):
    path = tmp_path / "docs.index"
    build(docs).save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(sparse_index._Build, "fill", fail)
    with pytest.raises(OSError, match="disk full"):
        sf.SparseIndex.build(docs[:1], path=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_build_never_writes_outside_the_index():
    """The op checks every place that it writes, because the rows of a file may change."""
    generator = torch.Generator().manual_seed(0)
    docs = draw_rows(generator, 600, 6, torch.float32, "plain")
    work = sparse_index._Build(docs, torch.arange(600, dtype=torch.int32))
    *whole, cols, places = work._rows
    whole += [places, work._posting_start]
    for changed in range(len(whole)):
        for seed in range(20):
            given = [tensor.clone() for tensor in whole]
            flat = given[changed].view(-1).view(torch.uint8)
            chosen = torch.randint(len(flat), (8,), generator=generator.manual_seed(seed))
            flat[chosen] = torch.randint(256, (8,), generator=generator, dtype=torch.uint8)
            work._rows, work._posting_start = (*given[:3], cols, given[3]), given[4]
            shapes = work.shapes.items()
            tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes}
            with contextlib.suppress(RuntimeError):
                work.fill(tensors)
    given[0][:, 0] = 7
    with pytest.raises(RuntimeError, match="index must have the shapes .* for the same rows"):
        work.fill(tensors)


def cut(path, docs):
    path.write_bytes(path.read_bytes()[:-1])


def write_rows(path, docs):
    docs.save(path)


def write_other_tensors(path, docs):
    save_file({"weight": torch.ones(2)}, path)


def write_more_columns(path, docs):
    tensors, _ = read_file(path, _FILE)
    write_file(path, {name: tensor.clone() for name, tensor in tensors.items()}, 5, _FILE)


@pytest.mark.parametrize("damage", [cut, write_rows, write_other_tensors, write_more_columns])
def test_other_files_are_refused(tmp_path, docs, damage):
    path = tmp_path / "docs.index"
    build(docs).save(path)
    damage(path, docs)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        sf.SparseIndex.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        sf.SparseIndex.load(tmp_path / "missing")


@pytest.mark.parametrize("change", [-1, 1, 100])
@pytest.mark.parametrize("name", ["term_start", "group", "start", "id", "value", "maximum"])
def test_changed_numbers_are_refused(tmp_path, name, change):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "docs.index"
    build(draw_rows(generator, 40, 6, torch.float32, "plain")).save(path)
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += change
    write_file(path, tensors, 6, _FILE)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: ")):
        sf.SparseIndex.load(path)


def test_search_never_reads_outside_a_damaged_index():
    """The op checks every place that it reads, because any tensors may reach it."""
    generator = torch.Generator().manual_seed(0)
    docs = draw_rows(generator, 600, 6, torch.float32, "plain")
    queries = docs[:2]
    operands = (queries.indices, queries.values, queries.lengths)
    whole = build(docs)._tensors
    for place in range(len(whole)):
        for seed in range(20):
            damaged = [tensor.clone() for tensor in whole]
            flat = damaged[place].view(-1).view(torch.uint8)
            chosen = torch.randint(len(flat), (8,), generator=generator.manual_seed(seed))
            flat[chosen] = torch.randint(256, (8,), generator=generator, dtype=torch.uint8)
            for algorithm in (1, 2):
                with contextlib.suppress(RuntimeError):
                    torch.ops.splade_fast.index_search(
                        *operands, damaged, 5, -torch.inf, None, algorithm
                    )


def test_long_queries_and_many_results():
    """Accumulators take two windows of groups; the rule chooses them for both."""
    generator = torch.Generator().manual_seed(0)
    docs = draw_rows(generator, 40_000, 60, torch.float32, "plain")
    index, query = build(docs), torch.rand(1, 60, generator=generator)
    for queries, k in ((query, 10), (query * (query > 0.9), 4000)):
        assert_same(search(index, queries, k), sf.sparse_search(queries, docs, k))


def test_no_kernels(docs, monkeypatch):
    monkeypatch.setattr("splade_fast._library._STATE.cpu_reason", "it was not built")
    with pytest.raises(RuntimeError, match="needs the compiled kernels of splade_fast: it was not"):
        build(docs)
