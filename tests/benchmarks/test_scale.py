"""The study of scale at tiny sizes, and the power laws through its numbers."""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import splade_fast
from benchmarks.__main__ import main
from benchmarks.harness.results import EXTRA_MEMORY, RESULTS, TIME, Measurement, read_csv
from benchmarks.harness.timing import QUICK
from benchmarks.studies import scale
from benchmarks.studies.scale import encode, load, search
from benchmarks.studies.scale.cache import CACHE, UpdateWork
from benchmarks.studies.scale.power_law import exponents, power_law
from benchmarks.studies.scale.work import Work, WrongError, measure_alone, quantity
from examples.docstrings.corpus import Pair
from splade_fast.negative_cache import CacheManager
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

SIZES = (100, 200, 400, 800, 1600)


def curve(values, *, quantity="time", unit="ms", subject="1 query"):
    return [
        Measurement(
            study="scale",
            part="search",
            subject=subject,
            axis="documents",
            size=size,
            quantity=quantity,
            value=value,
            unit=unit,
        )
        for size, value in zip(SIZES, values, strict=True)
    ]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7])
def test_a_power_law_is_found_again(exponent):
    law = power_law(SIZES, [3.0 * size**exponent for size in SIZES])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.prefactor == pytest.approx(3.0)
    assert law.standard_error < 1e-6
    assert law.at(1e6) == pytest.approx(3.0 * 1e6**exponent)


def test_the_error_of_an_exponent_is_that_of_repeated_measurements():
    generator = np.random.default_rng(0)
    noise = np.exp(0.1 * generator.standard_normal((400, len(SIZES))))
    laws = [power_law(SIZES, list(np.array(SIZES) * factors)) for factors in noise]
    assert np.mean([law.exponent for law in laws]) == pytest.approx(1.0, abs=0.02)
    spread = np.std([law.exponent for law in laws])
    errors = np.sqrt(np.mean([law.standard_error**2 for law in laws]))
    assert errors == pytest.approx(spread, rel=0.15)


def test_what_has_no_power_law_is_refused():
    with pytest.raises(ValueError, match="at least 3, got 2"):
        power_law([1, 2], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        power_law([1, 2, 3], [1, 0, 2])


def test_exponents_of_times_and_memory_but_not_of_rates():
    linear = [2.0 * size for size in SIZES]
    flat = curve([0.0] * len(SIZES), quantity="extra memory", unit="MiB")
    rates = curve([1.0] * len(SIZES), quantity="queries/s", unit="1/s")
    few = curve(linear, subject="64 queries")[:2]
    found = exponents([*curve(linear), *flat, *rates, *few])
    curves = [("search", "1 query", "ours", name) for name in ("extra memory", "time")]
    assert [(e.curve, e.axis, e.sizes) for e in found] == [(c, "documents", 5) for c in curves]
    assert [e.law.exponent for e in found] == pytest.approx([0, 1], abs=1e-9)


@dataclass(frozen=True)
class _Process(Work):
    def measure(self, rounds):
        threads = torch.get_num_threads()
        return [quantity(quantity="process", value=os.getpid(), unit=f"{threads} threads")]


def test_every_size_has_a_process_of_its_own():
    found = [measure_alone(_Process(), QUICK)[0] for _ in range(2)]
    assert len({os.getpid(), *(int(m.value) for m in found)}) == 3
    assert found[0].unit == f"{torch.get_num_threads()} threads"


@pytest.fixture
def tiny_corpus(tmp_path, monkeypatch):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [Pair(f"{i}", WORDS[i], " ".join(WORDS[i:])) for i in range(8)]
    monkeypatch.setattr(encode, "fetched", lambda checkpoint: folder)
    monkeypatch.setattr(encode, "docstring_pairs", lambda: pairs)
    encode._texts.cache_clear()
    yield
    encode._texts.cache_clear()


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(scale, "measure_alone", lambda work, rounds: work.measure(rounds))


TINY = {
    "encode": ((20, 40, 80), {TIME, EXTRA_MEMORY, "documents/s", encode.INDEX}),
    "load": ((1000, 2000, 4000), {TIME, load.KEPT}),
    "search": ((100, 200, 400), {TIME, EXTRA_MEMORY, "queries/s", search.ROWS, search.LOAD}),
    "cache": ((256, 512, 1024), {TIME, EXTRA_MEMORY, CACHE}),
    "vocabulary": ((300, 600, 1200), {TIME, EXTRA_MEMORY}),
    "length": ((4, 8, 16), {TIME, EXTRA_MEMORY}),
}


@pytest.mark.parametrize("name", scale.PARTS)
@pytest.mark.usefixtures("tiny_corpus", "in_this_process")
def test_a_part_at_tiny_sizes(name, tmp_path, monkeypatch):
    sizes, quantities = TINY[name]
    monkeypatch.setitem(scale.PARTS, name, replace(scale.PARTS[name], sizes=sizes))
    monkeypatch.setattr(scale.head, "_HEAD", replace(scale.head._HEAD, vocab=500, dim=32))
    monkeypatch.setattr(scale.head, "_POOL", replace(scale.head._POOL, vocab=500))
    options = ["--rounds=3", "--seconds=0", f"--threads={torch.get_num_threads()}"]
    assert main(["study", "scale", name, f"--out={tmp_path}", *options]) == 0
    rows = read_csv(tmp_path / "scale-cpu.csv")
    curves = {(row.subject, row.contender) for row in rows}
    assert {(row.subject, row.contender, row.size) for row in rows} == {
        (*curve, size) for curve in curves for size in sizes
    }
    assert {row.quantity for row in rows} == quantities
    assert all(row.part == name and row.value >= 0 and row.torch for row in rows)
    assert {(e.curve[1], e.curve[2]) for e in exponents(rows)} == curves


@pytest.mark.usefixtures("tiny_corpus", "in_this_process")
def test_an_unavailable_corpus_is_named_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "docstring_pairs", list)
    threads = f"--threads={torch.get_num_threads()}"
    assert main(["study", "scale", "encode 12500", threads, f"--out={tmp_path}"]) == 1
    assert "without encode 12500: one of torch, " in capsys.readouterr().out


def test_a_wrong_search_is_not_kept(tmp_path, monkeypatch):
    (_, work), _ = search.search_documents(100, tmp_path)
    right = splade_fast.sparse_search

    def wrong(queries, docs, k):
        scores, ids = right(queries, docs[: len(docs) // 2], k)
        return scores, ids

    monkeypatch.setattr(splade_fast, "sparse_search", wrong)
    with pytest.raises(WrongError, match="search of 100 documents"):
        work.measure(QUICK)


def test_a_wrong_update_is_not_kept(monkeypatch):
    right = CacheManager.update_cache

    def forgetful(self, cache, *, updated_item_data, updated_item_indices, **options):
        return right(self, cache, **options)

    monkeypatch.setattr(CacheManager, "update_cache", forgetful)
    with pytest.raises(WrongError, match="refreshed"):
        UpdateWork(64, 16, batch=4).measure(QUICK)


@pytest.mark.usefixtures("tiny_corpus")
def test_a_wrong_index_is_not_kept(tmp_path):
    ((_, work),) = encode.encode_documents(40, tmp_path)
    with pytest.raises(WrongError, match="has 40 documents, not 41"):
        replace(work, documents=41).measure(QUICK)


def test_the_committed_results_have_five_sizes():
    found = exponents(read_csv(RESULTS / "scale-cpu.csv"))
    assert min(e.sizes for e in found) >= 5
    assert {e.curve[0] for e in found} == {*scale.PARTS}
