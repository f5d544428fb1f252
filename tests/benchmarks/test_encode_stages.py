"""The study of the stages of an encode, with a tiny model."""

import pytest

from benchmarks.harness.timing import QUICK
from benchmarks.studies import encode_stages
from benchmarks.studies.encode_stages import encoders
from examples.docstrings.corpus import Pair
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint

SIZES = (encoders.Size("checkpoint", 6), encoders.Size("random", 6, 1, 64))


@pytest.mark.parametrize("size", SIZES, ids=["checkpoint", "random"])
@pytest.mark.parametrize("kind", sorted(encoders.ENCODERS))
def test_stages_add_up(monkeypatch, tmp_path, kind, size):
    model = save_checkpoint(masked_lm_configs()["bert"], tmp_path / "bert")
    pairs = [Pair(f"m{i}.f", "a", " ".join(WORDS[i % 9 :])) for i in range(6)]
    monkeypatch.setattr(encoders, "model_folder", lambda: str(model))
    monkeypatch.setattr(encode_stages, "docstring_pairs", lambda: pairs)
    monkeypatch.setattr(encode_stages, "SIZES", SIZES)
    measure = encode_stages.measurements(QUICK)[f"{kind} {size.name}"]
    found = {row.quantity: row.value for row in measure()}
    shares = [found.pop(stage) for stage in ("tokenize", "body", "head", "prune", "rest")]
    assert sum(shares) == pytest.approx(100)
    assert all(share > 0 for share in shares)
    lengths = [len(WORDS[i % 9 :]) + 2 for i in range(6)]
    expected = 1 - sum(lengths) / (6 * max(lengths))  # one batch
    assert found.pop("padding") == pytest.approx(expected)
    assert found.pop("share of body") == pytest.approx(
        found.pop("body alone") / found.pop("encode")
    )
    assert not found
