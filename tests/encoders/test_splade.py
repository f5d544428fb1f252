import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DebertaConfig,
    DebertaV2Config,
)

from splade_fast import reference
from splade_fast.encoders.hidden_states import find_decoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.ops.sparse_rows import SparseRows
from tests.tiny_models import (
    VOCAB_SIZE,
    WORDS,
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
    softcapped_config,
)

FAMILIES = masked_lm_configs()
TEXTS = ["quick fox", "", "the lazy dog sleeps under an old tree", "unknownword", "a", "quick fox"]
DOUBLE = {"dtype": torch.float64}  # rounding is small enough to compare two algorithms


def dense_by_formula(model, texts):
    """Pool the logits of one text at a time, without padding."""
    tokenizer = make_tokenizer()
    rows = []
    for text in texts:
        inputs = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            rows.append(reference.splade_pool(model(**inputs).logits, inputs["attention_mask"]))
    return torch.cat(rows)


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    return save_checkpoint(FAMILIES[request.param], tmp_path / request.param)


@pytest.fixture
def bert(tmp_path):
    return save_checkpoint(FAMILIES["bert"], tmp_path / "bert")


def test_encode_gives_every_text_its_own_vector_in_order(checkpoint):
    encoder = SpladeEncoder.from_pretrained(checkpoint, **DOUBLE)
    rows = encoder.encode(TEXTS, batch_size=2, show_progress=False)
    rows.check_contents()
    plain = AutoModelForMaskedLM.from_pretrained(checkpoint, **DOUBLE).eval()
    torch.testing.assert_close(rows.to_dense(), dense_by_formula(plain, TEXTS))


def test_loading_leaves_the_model_as_it_is(checkpoint):
    encoder = SpladeEncoder.from_pretrained(checkpoint)
    plain = AutoModelForMaskedLM.from_pretrained(checkpoint)
    encoder.encode(TEXTS, show_progress=False)
    assert list(encoder.model.state_dict()) == list(plain.state_dict())
    assert len(list(encoder.parameters())) == len(list(plain.parameters()))
    embeddings = encoder.model.get_input_embeddings()
    assert find_decoder(encoder.model).weight is embeddings.weight
    inputs = encoder.tokenize(["quick fox"])
    assert encoder.model(**inputs).logits.shape == (1, 4, VOCAB_SIZE)


def test_causal_language_models_work_too(tmp_path):
    folder = save_checkpoint(causal_lm_configs()["llama"], tmp_path / "llama")
    rows = SpladeEncoder.from_pretrained(folder, **DOUBLE).encode(TEXTS, show_progress=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, **DOUBLE).eval()
    torch.testing.assert_close(rows.to_dense(), dense_by_formula(plain, TEXTS))


def test_models_that_change_their_logits_are_refused():
    with pytest.raises(ValueError, match="Gemma2ForCausalLM must have the logits"):
        SpladeEncoder(make_model(softcapped_config()), make_tokenizer())


@pytest.mark.parametrize("config", [DebertaConfig, DebertaV2Config])
def test_models_with_logits_from_elsewhere_are_refused(config):
    model = AutoModelForMaskedLM.from_config(
        config(
            vocab_size=VOCAB_SIZE,
            hidden_size=VOCAB_SIZE,
            num_hidden_layers=1,
            legacy=False,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    with pytest.raises(ValueError, match="must have the logits"):
        SpladeEncoder(model, make_tokenizer())


def test_models_without_a_linear_decoder_are_refused(bert):
    model = AutoModelForMaskedLM.from_pretrained(bert).bert
    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear, got builtins.NoneType"):
        SpladeEncoder(model, make_tokenizer())


def test_k_keeps_the_largest(bert):
    encoder = SpladeEncoder.from_pretrained(bert)
    every = encoder.encode(TEXTS, show_progress=False).to_dense()
    few = encoder.encode(TEXTS, k=3, show_progress=False)
    assert few.equal(SparseRows.from_dense(every, k=3))


def test_a_string_is_one_text_and_no_text_is_no_row(bert):
    encoder = SpladeEncoder.from_pretrained(bert)
    one = encoder.encode("quick fox", show_progress=False)
    assert one.equal(encoder.encode(["quick fox"], show_progress=False))
    none = encoder.encode([], show_progress=False)
    assert (len(none), none.num_cols, none.dtype) == (0, VOCAB_SIZE, torch.float32)


def test_encode_under_autocast_has_the_dtype_of_forward(bert):
    encoder = SpladeEncoder.from_pretrained(bert, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder.encode(TEXTS, show_progress=False)
        vectors = encoder(**encoder.tokenize(TEXTS))
    assert rows.dtype == vectors.dtype == torch.float32
    assert encoder.encode([], show_progress=False).dtype == torch.bfloat16


def test_max_length_truncates(bert):
    encoder = SpladeEncoder.from_pretrained(bert, **DOUBLE)
    long, short = encoder.encode(
        ["quick brown fox jumps", "quick"], max_length=3, show_progress=False
    ).to_dense()
    torch.testing.assert_close(long, short)
    endless = " ".join(WORDS * 20)  # longer than the model's positions
    assert encoder.tokenize([endless], max_length=1000)["input_ids"].shape == (1, 64)


@pytest.mark.parametrize("training", [True, False])
def test_encode_restores_the_mode_even_after_an_error(bert, training, monkeypatch):
    encoder = SpladeEncoder.from_pretrained(bert).train(training)
    encoder.encode(TEXTS, show_progress=False)
    assert encoder.training == encoder.model.training == training
    monkeypatch.setattr(encoder, "tokenize", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(TEXTS, show_progress=False)
    assert encoder.training == encoder.model.training == training


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_takes_the_mode_of_its_model(training):
    encoder = SpladeEncoder(make_model(FAMILIES["bert"]).train(training), make_tokenizer())
    encoder.encode(TEXTS, show_progress=False)
    assert encoder.training == encoder.model.training == training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": ["a", None]}, TypeError, r"texts\[1\] must be a str, got NoneType"),
        (
            {"texts": ["a", "b\ud800"]},
            ValueError,
            r"texts\[1\] must be Unicode text, got the lone surrogate '\\ud800' at character 1",
        ),
        ({"texts": ["a"], "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"texts": ["a"], "max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"texts": ["a"], "k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"texts": ["a"], "prompt_name": "no"}, ValueError, r"prompt_name must be one of \[\]"),
    ],
)
def test_encode_refuses(bert, arguments, error, message):
    with pytest.raises(error, match=message):
        SpladeEncoder.from_pretrained(bert).encode(**arguments)


def test_code_and_pickles_of_checkpoints_never_run(bert):
    with pytest.raises(ValueError, match="trust_remote_code must be False"):
        SpladeEncoder.from_pretrained(bert, trust_remote_code=True)
    with pytest.raises(ValueError, match="weights_only must be True"):
        SpladeEncoder.from_pretrained(bert, weights_only=False)


def test_top_terms_are_the_heaviest_by_name(bert):
    encoder = SpladeEncoder.from_pretrained(bert)
    rows = SparseRows.from_dense(torch.zeros(2, VOCAB_SIZE).index_fill(1, torch.tensor([5]), 1.0))
    rows = SparseRows.cat([rows[:1], SparseRows.from_dense(torch.eye(VOCAB_SIZE)[[7]] * 2)])
    assert encoder.top_terms(rows) == [{"a": 1.0}, {"brown": 2.0}]
    every = encoder.encode("quick fox", show_progress=False)
    top = encoder.top_terms(every, 3)[0]
    assert list(top.values()) == every.values[0].sort(descending=True)[0][:3].tolist()


def test_columns_without_a_token_are_named_by_number():
    """Decoders are often wider than their tokenizer."""
    config = copy.copy(FAMILIES["bert"])
    config.vocab_size = VOCAB_SIZE + 3
    encoder = SpladeEncoder(make_model(config), make_tokenizer())
    weights = torch.zeros(1, VOCAB_SIZE + 3)
    weights[0, [5, VOCAB_SIZE, VOCAB_SIZE + 2]] = torch.tensor([1.0, 3.0, 2.0])
    [terms] = encoder.top_terms(SparseRows.from_dense(weights))
    assert terms == {f"[#{VOCAB_SIZE}]": 3.0, f"[#{VOCAB_SIZE + 2}]": 2.0, "a": 1.0}
    assert list(terms) == [f"[#{VOCAB_SIZE}]", f"[#{VOCAB_SIZE + 2}]", "a"]


def test_saved_models_load_in_transformers_and_again(checkpoint, tmp_path):
    encoder = SpladeEncoder.from_pretrained(checkpoint, **DOUBLE)
    encoder.save_pretrained(tmp_path / "saved")
    expected = encoder.encode(TEXTS, show_progress=False)
    assert (
        SpladeEncoder.from_pretrained(tmp_path / "saved", **DOUBLE)
        .encode(TEXTS, show_progress=False)
        .equal(expected)
    )
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", **DOUBLE).eval()
    torch.testing.assert_close(expected.to_dense(), dense_by_formula(plain, TEXTS))


def test_every_family_goes_to_sentence_transformers_and_back(checkpoint, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = SpladeEncoder.from_pretrained(checkpoint, **DOUBLE)
    encoder.save_pretrained(tmp_path / "ours")
    theirs = sentence_transformers.SparseEncoder(
        str(tmp_path / "ours"), device="cpu", model_kwargs=DOUBLE
    )
    expected = encoder.encode(TEXTS, show_progress=False).to_dense()
    vectors = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    torch.testing.assert_close(vectors, expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = SpladeEncoder.from_pretrained(tmp_path / "theirs", **DOUBLE)
    torch.testing.assert_close(back.encode(TEXTS, show_progress=False).to_dense(), expected)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["log1p_relu", "log1p_log1p_relu"])
def test_saved_models_load_in_sentence_transformers(bert, tmp_path, pooling, activation):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    prompts = {"query": "quick ", "document": ""}
    settings = EncoderSettings(pooling, activation, 5, prompts, "query")
    plain = SpladeEncoder.from_pretrained(bert, **DOUBLE)
    encoder = SpladeEncoder(plain.model, plain.tokenizer, settings)
    encoder.save_pretrained(tmp_path / "saved")
    theirs = sentence_transformers.SparseEncoder(
        str(tmp_path / "saved"), device="cpu", model_kwargs=DOUBLE
    )
    expected = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    mine = encoder.encode(TEXTS, show_progress=False)
    torch.testing.assert_close(mine.to_dense(), expected)
    again = SpladeEncoder.from_pretrained(tmp_path / "saved", **DOUBLE)
    assert again.settings == settings
    assert again.encode(TEXTS, show_progress=False).equal(mine)


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_sentence_transformers_folders_load(bert, tmp_path, activation):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    transformer = Transformer(str(bert), transformer_task="fill-mask", model_kwargs=DOUBLE)
    pooling = SpladePooling("sum", activation)
    theirs = sentence_transformers.SparseEncoder(modules=[transformer, pooling], device="cpu")
    theirs.max_seq_length = 6
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = SpladeEncoder.from_pretrained(tmp_path / "theirs", **DOUBLE).encode(
        TEXTS, show_progress=False
    )
    expected = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    torch.testing.assert_close(mine.to_dense(), expected)


def test_older_sentence_transformers_folders_load(bert):
    """Older folders have a subfolder for the transformer, `do_lower_case` and other names."""
    inner = bert / "0_MLMTransformer"
    inner.mkdir()
    for file in [entry for entry in bert.iterdir() if entry.is_file()]:
        file.rename(inner / file.name)
    (bert / "1_SpladePooling").mkdir()
    package = "sentence_transformers.sparse_encoder.models"
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": inner.name, "type": f"{package}.MLMTransformer"},
            {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{package}.SpladePooling"},
        ],
        "0_MLMTransformer/sentence_bert_config.json": {"max_seq_length": 4, "do_lower_case": True},
        "1_SpladePooling/config.json": {
            "pooling_strategy": "sum",
            "activation_function": "relu",
            "word_embedding_dimension": VOCAB_SIZE,
        },
    }
    for name, content in files.items():
        (bert / name).write_text(json.dumps(content))
    encoder = SpladeEncoder.from_pretrained(bert)
    assert encoder.settings.pooling == "sum"
    assert encoder.tokenize(["QUICK fox jumps over"])["input_ids"].tolist() == (
        encoder.tokenize(["quick fox"])["input_ids"].tolist()
    )


@pytest.mark.parametrize("kinds", [["Transformer", "Pooling"], ["Dense"], ["Transformer"]])
def test_other_sentence_transformers_folders_are_refused(bert, kinds):
    modules = [{"idx": i, "path": "", "type": f"x.{kind}"} for i, kind in enumerate(kinds)]
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=f"SpladePooling, got {', '.join(kinds)}"):
        SpladeEncoder.from_pretrained(bert)


@pytest.mark.parametrize("modules", [{"type": "x"}, [{"type": "x.Transformer"}], ["x"]])
def test_malformed_sentence_transformers_folders_are_refused(bert, modules):
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules.json of .* with a type and a path, got"):
        SpladeEncoder.from_pretrained(bert)


def test_activations_that_cannot_be_saved_leave_nothing_behind(bert, tmp_path):
    plain = SpladeEncoder.from_pretrained(bert)
    encoder = SpladeEncoder(plain.model, plain.tokenizer, EncoderSettings(activation="relu"))
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'relu'"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_missing_folders_are_an_error(tmp_path):
    with pytest.raises(OSError, match="no_such_model"):
        SpladeEncoder.from_pretrained(tmp_path / "no_such_model")
