"""Several sources of training data: shares, batches of one source, and the trainer's batches."""

from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from splade_fast.training import command
from splade_fast.training.data.sources import SourceSampler, SourceStream
from tests.training.runs import checkpoint_in, make_trainer, write_pairs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


def source_of(index, sizes):
    for source, size in enumerate(sizes):
        if index < size:
            return source
        index -= size
    raise IndexError


@pytest.mark.parametrize("group", [1, 4])
def test_all_examples_once_by_default(group):
    sizes = [12, 8, 40]
    sampler = SourceSampler(sizes, None, group, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(60))
    assert len(sampler) == 60
    groups = [first[i : i + group] for i in range(0, 60, group)]
    assert all(len({source_of(i, sizes) for i in one}) == 1 for one in groups)
    assert [source_of(i, sizes) for i in first] != sorted(source_of(i, sizes) for i in first)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)
    assert list(sampler) != first


def test_weights_are_shares_of_the_groups():
    sizes = [10, 100]
    sampler = SourceSampler(sizes, [3.0, 1.0], 5, seed=0)
    drawn = list(sampler)
    counts = Counter(source_of(i, sizes) for i in drawn)
    assert counts == {0: 85, 1: 25}  # 16.5 and 5.5 of 22 groups, the first remainder rounded up
    of_first = Counter(i for i in drawn if i < 10)
    assert set(of_first.values()) == {8, 9}  # repeated whole
    assert len(set(drawn) - set(range(10))) == 25


def test_streams_by_groups_and_weights():
    streams = [list("ab"), [0, 1, 2]]
    sampled = list(islice(SourceStream(streams, [1.0, 3.0], 2, seed=0), 800))
    pairs = [tuple(sampled[i : i + 2]) for i in range(0, 800, 2)]
    assert {type(a) is type(b) for a, b in pairs} == {True}
    numbers = [value for value in sampled if isinstance(value, int)]
    assert numbers[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert 0.7 < len(numbers) / 800 < 0.8
    assert sampled == list(islice(SourceStream(streams, [1.0, 3.0], 2, seed=0), 800))


def test_streams_in_data_loading_processes():
    """A process whose part of a stream is empty draws from the others."""
    one = Dataset.from_dict({"x": list(range(4))}).to_iterable_dataset(num_shards=1)
    two = Dataset.from_dict({"x": list(range(100, 108))}).to_iterable_dataset(num_shards=2)
    loader = DataLoader(SourceStream([one, two], None, 2, seed=0), batch_size=2, num_workers=2)
    batches = [tuple((batch["x"] >= 100).tolist()) for batch in islice(loader, 24)]
    assert set(batches[0::2]) == {(True, True), (False, False)}
    assert set(batches[1::2]) == {(True, True)}


def examples(word, count, **columns):
    return Dataset.from_list(
        [{"query": f"{word} {i}", "document": f"{word} fox {i}", **columns} for i in range(count)]
    )


class _Recorder:
    """A collator that notes the first words of each batch's queries."""

    def __init__(self):
        self.batches = []

    def of(self, trainer):
        collate = trainer.data_collator

        def collator(batch):
            self.batches.append([one["query"].split()[0] for one in batch])
            return collate(batch)

        trainer.data_collator = collator
        return trainer


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_one_source(checkpoint, tmp_path, streaming):
    """Sources of different kinds, each with its share."""
    sources = {
        "pairs": examples("quick", 8),
        "hard": examples("lazy", 16, negatives=["a dog", "an old tree"]),
    }
    if streaming:
        sources = {name: source.to_iterable_dataset() for name, source in sources.items()}
    recorder = _Recorder()
    trainer = recorder.of(
        make_trainer(
            checkpoint,
            sources,
            tmp_path,
            batch_sources="separate",
            source_weights=[1.0, 1.0],
            max_steps=6,
            loss="in_batch",
        )
    )
    trainer.train()
    assert all(len(set(batch)) == 1 for batch in recorder.batches)
    counts = Counter(batch[0] for batch in recorder.batches[:6])
    assert set(counts) == {"quick", "lazy"}
    if not streaming:
        assert counts == {"quick": 3, "lazy": 3}


def test_epochs_draw_anew(checkpoint, tmp_path):
    recorder = _Recorder()
    sources = {"one": examples("quick", 9), "two": examples("lazy", 15)}
    trainer = recorder.of(
        make_trainer(checkpoint, sources, tmp_path, num_train_epochs=2, loss="in_batch")
    )
    trainer.train()
    epochs = recorder.batches[:6], recorder.batches[6:]
    for epoch in epochs:
        assert Counter(word for batch in epoch for word in batch) == {"quick": 9, "lazy": 15}
    assert epochs[0] != epochs[1]
    assert any(len(set(batch)) == 2 for batch in epochs[0])


def test_command_keeps_files_apart(checkpoint, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.tsv", 8)
    triples = tmp_path / "triples.tsv"
    triples.write_text("quick\ta quick fox\ta dog\n" * 8)
    flags = [
        f"--model_name_or_path={checkpoint}", "--train_data", str(pairs), str(triples),
        "--max_steps=4", "--per_device_train_batch_size=2", "--report_to=none", "--loss=in_batch",
    ]  # fmt: skip
    shares = ["--batch_sources=separate", "--source_weights", "0.5", "0.5"]
    assert "4 steps" in command.train([*flags, f"--output_dir={tmp_path / 'run'}", *shares])
    with pytest.raises(ValueError, match="must each be of one kind"):
        command.train([*flags, f"--output_dir={tmp_path / 'mixed'}", *shares[1:]])


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({}, {}, "train_dataset must have at least one source, got none"),
        ({"a": 8}, {"source_weights": [1.0, 2.0]}, "one for each of the 1 sources, got 2"),
        ({"a": 8}, {"source_weights": [0.0]}, "source_weights must be above 0 and finite, got 0.0"),
        ({"a": 8, "b": 3}, {"batch_sources": "separate"}, "at least 4 examples in each .*, got 3"),
        ({"a": 8, "b": 0}, {}, "must have examples in each source, got none in b"),
        ({"a": 8}, {"batch_sources": "apart"}, "batch_sources must be one of mixed, separate"),
        ({"a": 8}, {"train_sampling_strategy": "sequential"}, "must be 'random' for several"),
        (8, {"source_weights": [1.0]}, "source_weights must be None for one source, got 1"),
    ],
)
def test_bad_sources(checkpoint, tmp_path, sources, options, message):
    made = (
        examples("quick", sources)
        if isinstance(sources, int)
        else {name: examples("quick", size) for name, size in sources.items()}
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(checkpoint, made, tmp_path, **options)


def test_streams_beside_tables(checkpoint, tmp_path):
    sources = {"a": examples("quick", 8), "b": examples("lazy", 8).to_iterable_dataset()}
    with pytest.raises(ValueError, match="must have only streams or none, got both"):
        make_trainer(checkpoint, sources, tmp_path, max_steps=1)
