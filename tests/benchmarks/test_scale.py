"""The study of scale at tiny sizes, and what it computes from its numbers."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import splade_fast
from benchmarks.harness.facts import merged, recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv
from benchmarks.report import write_report
from benchmarks.studies.scale import __main__ as study
from benchmarks.studies.scale import encode, load, on_paper, search
from benchmarks.studies.scale.cache import CACHE, UpdateWork
from benchmarks.studies.scale.findings import EXTRA_MEMORY, TIME, Fact, Finding, Quantity, in_order
from benchmarks.studies.scale.power_law import Exponent, exponents, power_law
from benchmarks.studies.scale.work import Rounds, Work, WrongError, measured_alone
from examples.docstrings.corpus import Pair
from splade_fast.negative_cache import CacheManager
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
SIZES = (100, 200, 400, 800, 1600)
ROUNDS = Rounds(3, 0)


def curve(values, *, quantity="time", unit="ms", study="search", variant="1 query"):
    return [
        Finding(
            study=study,
            variant=variant,
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
    few = curve(linear, variant="64 queries")[:2]
    found = exponents([*curve(linear), *flat, *rates, *few])
    assert [(e.quantity, e.sizes) for e in found] == [("extra memory", 5), ("time", 5)]
    assert [e.exponent for e in found] == pytest.approx([0, 1], abs=1e-9)
    assert (found[1].smallest, found[1].largest) == (100, 1600)


def test_facts_come_back_and_new_ones_replace_the_old(tmp_path):
    machine = Machine.current("cpu")
    old = recorded(curve([5.0, 4.0, 3.0, 2.0, 1.0]), Fact, machine)
    write_csv(old, Fact, tmp_path / "scale.csv")
    again = read_csv(Fact, tmp_path / "scale.csv")
    assert again == old
    new = recorded(curve([9.0] * 5)[1:2], Fact, machine)
    assert [fact.value for fact in merged(again, new, in_order)] == [5.0, 9.0, 3.0, 2.0, 1.0]


@dataclass(frozen=True)
class _Process(Work):
    def measure(self, rounds):
        threads = torch.get_num_threads()
        return [Quantity(quantity="process", value=os.getpid(), unit=f"{threads} threads")]


def test_every_size_has_a_process_of_its_own():
    found = [measured_alone(_Process(), ROUNDS)[0] for _ in range(2)]
    assert len({os.getpid(), *(int(quantity.value) for quantity in found)}) == 3
    assert found[0].unit == f"{torch.get_num_threads()} threads"


@pytest.fixture
def tiny_corpus(tmp_path, monkeypatch):
    folder = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [Pair(f"{i}", WORDS[i], " ".join(WORDS[i:])) for i in range(8)]
    monkeypatch.setattr(encode, "fetched", lambda checkpoint: folder)
    monkeypatch.setattr(encode, "docstring_pairs", lambda: pairs)
    encode._documents.cache_clear()
    yield
    encode._documents.cache_clear()


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(study, "measured_alone", lambda work, rounds: work.measure(rounds))


TINY = {
    "encode": ((20, 40, 80), {TIME, EXTRA_MEMORY, "documents/s", encode.INDEX}),
    "load": ((1000, 2000, 4000), {TIME, load.KEPT}),
    "search": ((100, 200, 400), {TIME, EXTRA_MEMORY, "queries/s", search.ROWS, search.LOAD}),
    "cache": ((256, 512, 1024), {TIME, EXTRA_MEMORY, CACHE}),
    "vocabulary": ((300, 600, 1200), {TIME, EXTRA_MEMORY}),
    "length": ((4, 8, 16), {TIME, EXTRA_MEMORY}),
}


@pytest.mark.parametrize("name", study.STUDIES)
@pytest.mark.usefixtures("tiny_corpus", "in_this_process")
def test_a_study_at_tiny_sizes(name, tmp_path):
    sizes, quantities = TINY[name]
    options = ["--sizes", *map(str, sizes), "--rounds=3", "--seconds=0", f"--out={tmp_path}"]
    threads = f"--threads={torch.get_num_threads()}"
    assert study.main([name, threads, *options]) == 0
    facts = read_csv(Fact, tmp_path / "scale-cpu.csv")
    variants = {fact.variant for fact in facts}
    assert {(fact.variant, fact.size) for fact in facts} == {
        (variant, size) for variant in variants for size in sizes
    }
    assert {fact.quantity for fact in facts} == quantities
    assert all(fact.study == name and fact.value >= 0 and fact.torch for fact in facts)
    fitted = read_csv(Exponent, tmp_path / "scale_exponents-cpu.csv")
    assert {e.variant for e in fitted} == variants
    assert (tmp_path / "scale-cpu.svg").exists()
    write_report(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"### {name}\n" in page
    assert f"| {sizes[-1]:,} |" in page
    assert "](page/scale-cpu.svg)" in page
    assert "## scale_exponents-cpu" in page


def test_an_unknown_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        study.main(["everything"])
    assert "no study everything; there are encode" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_corpus", "in_this_process")
def test_what_cannot_be_had_is_named_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "docstring_pairs", list)
    threads = f"--threads={torch.get_num_threads()}"
    assert study.main(["encode", "--sizes=10", threads, f"--out={tmp_path}"]) == 1
    assert "without encode of 10 documents: one of torch, " in capsys.readouterr().out


def test_a_wrong_search_is_not_kept(tmp_path, monkeypatch):
    (work, _) = search.of_documents(100, tmp_path).values()
    right = splade_fast.sparse_search

    def wrong(queries, docs, k):
        scores, ids = right(queries, docs[: len(docs) // 2], k)
        return scores, ids

    monkeypatch.setattr(splade_fast, "sparse_search", wrong)
    with pytest.raises(WrongError, match="search of 100 documents"):
        work.measure(ROUNDS)


def test_a_wrong_update_is_not_kept(monkeypatch):
    right = CacheManager.update_cache

    def forgetful(self, cache, *, updated_item_data, updated_item_indices, **options):
        return right(self, cache, **options)

    monkeypatch.setattr(CacheManager, "update_cache", forgetful)
    with pytest.raises(WrongError, match="refreshed"):
        UpdateWork(64, 16, batch=4).measure(ROUNDS)


@pytest.mark.usefixtures("tiny_corpus")
def test_a_wrong_index_is_not_kept(tmp_path):
    work = encode.of_documents(40, tmp_path)[encode.COMMAND]
    with pytest.raises(WrongError, match="has 40 documents, not 41"):
        replace(work, documents=41).measure(ROUNDS)


@pytest.mark.parametrize("wanted", ["1 query", "64 queries"])
def test_curves_are_extended(wanted):
    findings = curve([0.5 * size for size in SIZES], variant=wanted)
    findings += curve([0.25 * size for size in SIZES], quantity="rows", unit="MiB", variant=wanted)
    milliseconds = on_paper.extended(findings, "search", wanted, "time", 10**8)
    assert milliseconds == pytest.approx(0.5e8)
    rows = on_paper.extended(findings, "search", wanted, "rows", 10**8)
    assert rows == pytest.approx(0.25e8 * 2**20)
    with pytest.raises(KeyError):
        on_paper.extended(findings, "search", "2 queries", "time", 10**8)


def test_the_committed_exponents_are_those_of_the_committed_facts():
    fitted = exponents(read_csv(Fact, RESULTS / "scale-cpu.csv"))
    kept = read_csv(Exponent, RESULTS / "scale_exponents-cpu.csv")
    assert [replace(e, prefactor=0.0, exponent=0.0, standard_error=0.0) for e in fitted] == [
        replace(e, prefactor=0.0, exponent=0.0, standard_error=0.0) for e in kept
    ]
    # To the digits of the CSV.
    numbers = [(e.prefactor, e.exponent, e.standard_error) for e in fitted]
    assert np.array([(e.prefactor, e.exponent, e.standard_error) for e in kept]) == pytest.approx(
        np.array(numbers), rel=1e-5, abs=1e-9
    )
    assert min(e.sizes for e in fitted) >= 5


def test_the_page_says_what_is_computed_from_the_committed_facts():
    assert on_paper.section(read_csv(Fact, RESULTS / "scale-cpu.csv")) in PAGE.read_text()
