import torch

from examples.docstrings.negative_cache import Texts, plot, train, word_ids


def test_loss_falls_and_staleness_is_seen(tmp_path):
    """Train on queries that are the first words of their documents."""
    torch.manual_seed(0)
    documents = torch.randint(1, 2000, (300, 128), dtype=torch.int32)
    texts = Texts(documents[:, :24], documents)
    options = {"held_out": 50, "cache_size": 100, "batch": 16, "evaluations": 4}
    progress = list(train(texts, steps=120, **options))
    assert [point.step for point in progress] == list(range(1, 121))
    assert [point.step for point in progress if point.mrr is not None] == [30, 60, 90, 120]
    assert progress[0].loss == 0  # an empty cache
    early = sum(point.loss for point in progress[10:30])
    assert sum(point.loss for point in progress[-20:]) < 0.7 * early
    assert all(point.staleness > 0 for point in progress[10:])
    plot(progress, tmp_path / "plots" / "training.png")
    assert (tmp_path / "plots" / "training.png").stat().st_size > 0


def test_words():
    ids = word_ids("Sort the Tensor, the 2nd.", 8)
    assert ids[1] == ids[3]
    assert ids[6:] == [0, 0]
    assert 0 not in ids[:6]
    assert word_ids("a b c", 2) == word_ids("a b", 2)
