import json
from itertools import permutations

import pytest

from examples.docstrings import recipe
from examples.docstrings.corpus import Pair
from examples.docstrings.training import FINE_TUNING, Progress, split_pairs
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.recipe import BM25Teacher, EncoderTeacher
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

# Each query is the first words of its document, and other documents hold some of them.
PAIRS = [
    Pair(f"package.m{i}.f", f"{a} {b}", f"{a} {b} {c} {WORDS[i % 3]}")
    for i, (a, b, c) in enumerate(list(permutations(WORDS[:6], 3))[::3])
]
SMALL = {
    "cache_document_length": 16,
    "max_document_length": 16,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("m") / "bert")


def test_lists_hold_hard_negatives_with_the_scores_of_the_ensemble(checkpoint, tmp_path):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    documents = [pair.document for pair in PAIRS]
    file = recipe.write_scored_lists(encoder, PAIRS, tmp_path)
    lists = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lists) > len(PAIRS) / 2
    teachers = BM25Teacher(documents), EncoderTeacher(encoder)
    for found in lists:
        pair = PAIRS[int(found["query_id"])]
        assert (found["query"], found["documents"][0]) == (pair.query, pair.document)
        assert len(set(found["documents"])) == 1 + recipe.RULES.num_negatives
        scores = [teacher([pair.query], [found["documents"]])[0] for teacher in teachers]
        assert scores[1][0] >= scores[1].max()  # the margin
        units = [(s - s.min()) / (s.max() - s.min()).clamp(min=1e-9) for s in scores]
        expected = recipe.SCALE * (units[0] + units[1]) / 2
        assert found["scores"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_steps_of_a_round_follow_those_before_it():
    progress = [Progress(10, 1.0, 3.0, 9.0, None), Progress(20, 1.0, 3.0, 9.0, None, 0.3, 90.0)]
    assert recipe.measured_points(progress, 100) == [recipe.Point(120, 0.3, 90.0)]


def test_both_rounds_and_the_control_are_shown(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "docstring_pairs", lambda: PAIRS)
    monkeypatch.setattr(recipe, "demo_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(recipe, "FINE_TUNING", FINE_TUNING | SMALL | {"cache_size": 8})
    monkeypatch.setattr(recipe, "CONTROL", recipe.CONTROL | SMALL | {"cache_size": 8})
    monkeypatch.setattr(recipe, "DISTILLATION", recipe.DISTILLATION | SMALL)
    assert split_pairs(PAIRS).held_out
    plot = tmp_path / "plots" / "recipe.png"
    recipe.recipe(
        steps=2, second_steps=2, num_queries=3, limit=None, threads=1, plot_file=plot, control=True
    )
    shown = capsys.readouterr().out
    for row in (
        "BM25",
        "round one",
        "round two",
        "mean of both",
        "control",
        "lists whose first document",
    ):
        assert row in shown
    assert plot.stat().st_size > 0
