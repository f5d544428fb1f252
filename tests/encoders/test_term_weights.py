import pytest
import torch
from transformers import AutoModel

import splade_fast as sf
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.tiny_models import (
    SPECIAL,
    VOCAB_SIZE,
    causal_lm_configs,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}
TEXTS = ["quick quick fox", "", "the lazy dog sleeps under the old tree", "unknownword fox"]


@pytest.fixture
def bert(tmp_path):
    return save_checkpoint(FAMILIES["bert"], tmp_path / "bert")


def by_formula(encoder, inputs):
    """Return the maximum over positions of a (B, L, V) tensor of one-hot weights."""
    hidden = encoder.model(**inputs).last_hidden_state
    weights = torch.relu(encoder.projection(hidden).squeeze(-1))
    if encoder.settings.activation == "log1p_relu":
        weights = torch.log1p(weights)
    one_hot = torch.nn.functional.one_hot(inputs["input_ids"], encoder.vocab_size)
    mask = inputs["attention_mask"].clone()
    mask[inputs["input_ids"] < len(SPECIAL)] = 0
    return (weights * mask).unsqueeze(-1).mul(one_hot).amax(1)


def gradients(encoder, vectors):
    encoder.zero_grad()
    upstream = torch.linspace(0.1, 1, vectors.numel(), dtype=vectors.dtype).view(vectors.shape)
    vectors.backward(upstream)
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("activation", ["log1p_relu", "relu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_are_those_of_the_formula(family, activation, tmp_path):
    folder = save_checkpoint(FAMILIES[family], tmp_path / family)
    encoder = TermWeightEncoder.from_pretrained(folder)
    encoder.settings.activation = activation
    torch.nn.init.normal_(encoder.projection.weight, std=0.5)  # some positive, some not
    inputs = encoder.tokenize(TEXTS)
    actual = encoder(**inputs)
    ours = gradients(encoder, actual)
    baseline = by_formula(encoder, inputs)
    theirs = gradients(encoder, baseline)
    truth = by_formula(encoder.double(), inputs)
    exact = gradients(encoder, truth)
    assert (truth > 0).any()
    assert not actual[:, : len(SPECIAL)].any()
    assert not actual[1].any()  # an empty text
    assert_accurate(actual.detach(), truth.detach(), baseline.detach())
    assert {"projection.weight", "projection.bias"} <= ours.keys()
    assert_accurate_gradients(ours, exact, theirs)
    precise = encoder(**inputs)  # float64, to compare each parameter
    torch.testing.assert_close(precise, truth)
    for name, gradient in gradients(encoder, precise).items():
        torch.testing.assert_close(gradient, exact[name], msg=name)


def test_a_new_projection_weighs_every_term_and_every_parameter_gets_a_gradient(bert):
    encoder = TermWeightEncoder.from_pretrained(bert)
    words = set(" ".join(TEXTS).split()) - {"unknownword"}
    assert (encoder(**encoder.tokenize(TEXTS)).amax(0) > 0).sum() == len(words)
    got = gradients(encoder, encoder(**encoder.tokenize(TEXTS)))
    assert got.keys() == dict(encoder.named_parameters()).keys()


def test_equal_occurrences_share_the_gradient(bert, monkeypatch):
    encoder = TermWeightEncoder.from_pretrained(bert)
    hidden = torch.ones(1, 3, 16, requires_grad=True)
    torch.nn.init.constant_(encoder.projection.weight, 0.1)
    output = type("Output", (), {"last_hidden_state": hidden})
    monkeypatch.setattr(encoder.model, "forward", lambda **inputs: output)
    encoder(torch.tensor([[6, 7, 6]]))[0, 6].backward()
    assert hidden.grad[0, 0].any()
    assert torch.equal(hidden.grad[0, 0], hidden.grad[0, 2])
    assert not hidden.grad[0, 1].any()


@pytest.mark.parametrize("k", [None, 2])
def test_encode_is_forward_as_rows(bert, k):
    encoder = TermWeightEncoder.from_pretrained(bert, dtype=torch.float64)
    rows = encoder.encode(TEXTS, k=k, batch_size=2, show_progress=False)
    rows.check_contents()
    expected = encoder(**encoder.tokenize(TEXTS)).detach()
    if k is not None:
        expected = sf.prune_topk(expected, k)
    torch.testing.assert_close(rows.to_dense(), expected)
    terms = encoder.top_terms(encoder.encode("quick fox", show_progress=False))
    assert set(terms[0]) <= {"quick", "fox"}


def test_saved_folders_load_again_and_in_transformers(bert, tmp_path):
    encoder = TermWeightEncoder.from_pretrained(bert)
    encoder.settings = EncoderSettings(activation="relu", max_length=5, prompts={"query": "a "})
    encoder.save_pretrained(tmp_path / "saved")
    again = sf.TermWeightEncoder.from_pretrained(tmp_path / "saved")
    assert again.settings == encoder.settings
    expected = encoder.encode(TEXTS, show_progress=False)
    assert again.encode(TEXTS, show_progress=False).equal(expected)
    plain = AutoModel.from_pretrained(tmp_path / "saved").eval()
    inputs = encoder.tokenize(TEXTS)
    with torch.no_grad():
        theirs, mine = plain(**inputs)[0], encoder.model(**inputs)[0]
    torch.testing.assert_close(theirs, mine)


def test_folders_of_bge_m3_load(bert):
    state = {"weight": torch.randn(1, 16).half(), "bias": torch.ones(1).half()}
    torch.save(state, bert / "sparse_linear.pt")
    encoder = TermWeightEncoder.from_pretrained(bert)
    assert encoder.settings.activation == "relu"
    assert torch.equal(encoder.projection.weight, state["weight"].float())
    torch.testing.assert_close(
        encoder.encode(TEXTS, show_progress=False).to_dense(),
        by_formula(encoder, encoder.tokenize(TEXTS)).detach(),
    )


def test_autocast_gives_float32(bert):
    encoder = TermWeightEncoder.from_pretrained(bert)
    inputs = encoder.tokenize(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        actual, baseline = encoder(**inputs), by_formula(encoder, inputs).float()
    ours = gradients(encoder, actual)
    theirs = gradients(encoder, baseline)
    truth = by_formula(encoder.double(), inputs)
    exact = gradients(encoder, truth)
    assert_accurate(actual.detach(), truth.detach(), baseline.detach())
    assert_accurate_gradients(ours, exact, theirs)


def test_compiles_whole(bert):
    torch.compiler.reset()
    encoder = TermWeightEncoder.from_pretrained(bert)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    inputs = encoder.tokenize(TEXTS)
    torch.testing.assert_close(compiled(**inputs), encoder(**inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": EncoderSettings(pooling="sum")}, "pooling must be 'max', got 'sum'"),
        (
            {"settings": EncoderSettings(activation="log1p_log1p_relu")},
            "activation must be .* got 'log1p_log",
        ),
        ({"projection": torch.nn.Linear(4, 1)}, "a Linear of 16 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        TermWeightEncoder(AutoModel.from_pretrained(bert), make_tokenizer(), **arguments)


def test_bad_masks_and_checkpoints_are_refused(bert, tmp_path):
    encoder = TermWeightEncoder.from_pretrained(bert)
    ids = encoder.tokenize(TEXTS)["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\) = \(4, "):
        encoder(ids, torch.ones(4, 1))
    with pytest.raises(ValueError, match="trust_remote_code must be False"):
        TermWeightEncoder.from_pretrained(bert, trust_remote_code=True)
    (bert / "term_weights.json").write_text('{"pruning": 1}')
    with pytest.raises(ValueError, match=r"term_weights.json of .* must hold settings: .*pruning"):
        TermWeightEncoder.from_pretrained(bert)
    (bert / "term_weights.json").write_text("{")
    with pytest.raises(ValueError, match=r"term_weights.json of .* must be JSON"):
        TermWeightEncoder.from_pretrained(bert)
    with pytest.raises(OSError, match="no_such_model"):
        TermWeightEncoder.from_pretrained(tmp_path / "no_such_model")
    assert encoder.vocab_size == VOCAB_SIZE
