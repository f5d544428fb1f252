import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import splade_fast as sf
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from tests.tiny_models import SPECIAL, VOCAB_SIZE, WORDS, make_tokenizer

TEXTS = ["quick quick fox", "", "the lazy dog sleeps under the old tree", "fox"]


def make_encoder(**options):
    weight = torch.linspace(-1, 2, VOCAB_SIZE)
    weight[len(SPECIAL) + WORDS.index("dog")] = 0
    return BagOfWordsQueryEncoder(make_tokenizer(), weight, **options)


def by_formula(encoder, texts):
    vectors = torch.zeros(len(texts), encoder.vocab_size)
    for row, text in enumerate(texts):
        for token in text.split():
            column = encoder.tokenizer.convert_tokens_to_ids(token)
            vectors[row, column] = encoder.weight.detach()[column]
    return vectors


def test_vectors_and_gradients_are_those_of_the_formula():
    encoder = make_encoder()
    vectors = encoder(**encoder.tokenize(TEXTS))
    expected = by_formula(encoder, TEXTS)
    assert torch.equal(vectors, expected)
    upstream = torch.rand(vectors.shape)
    vectors.backward(upstream)
    present = by_formula(BagOfWordsQueryEncoder(make_tokenizer()), TEXTS)
    torch.testing.assert_close(encoder.weight.grad, (present * upstream).sum(0))


def test_padding_that_is_a_word_does_not_count():
    encoder = make_encoder()
    ids = torch.tensor([[6, 7], [7, 6]])
    mask = torch.tensor([[1, 0], [1, 1]])
    vectors = encoder(ids, mask)
    assert vectors[0].nonzero().flatten().tolist() == [6]
    assert vectors[1].nonzero().flatten().tolist() == [6, 7]
    assert torch.equal(encoder(ids), encoder(ids, torch.ones(2, 2)))


def test_infinite_weights_of_absent_terms_do_not_show():
    weight = torch.ones(VOCAB_SIZE)
    weight[5] = torch.inf
    encoder = BagOfWordsQueryEncoder(make_tokenizer(), weight)
    assert encoder(torch.tensor([[6]])).sum() == 1


def test_encode_keeps_all_but_zeros():
    encoder = make_encoder()
    rows = encoder.encode(TEXTS, batch_size=2, show_progress=False)
    rows.check_contents()
    assert torch.equal(rows.to_dense(), by_formula(encoder, TEXTS))
    assert (rows.values != 0).sum(1).tolist() == rows.lengths.tolist()
    few = encoder.encode(TEXTS, k=2, show_progress=False)
    for row, text in enumerate(TEXTS):
        weights = by_formula(encoder, [text])[0]
        best = weights[weights != 0].sort(descending=True).values[:2]
        kept = few.values[row, : few.lengths[row]].sort(descending=True).values
        assert torch.equal(kept, best)


def test_weights_of_a_corpus_are_its_inverse_document_frequencies():
    encoder = BagOfWordsQueryEncoder.from_texts(TEXTS, make_tokenizer(), VOCAB_SIZE + 3)
    assert not encoder.weight.requires_grad
    assert encoder.vocab_size == VOCAB_SIZE + 3
    counts = {"fox": 2, "quick": 1, "jumps": 0}
    for word, count in counts.items():
        column = len(SPECIAL) + WORDS.index(word)
        expected = torch.tensor(1 + (4 - count + 0.5) / (count + 0.5)).log()
        torch.testing.assert_close(encoder.weight[column], expected)


def test_texts_beyond_the_models_limit_are_counted_without_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    texts = ["quick " * 1000 + "fox"]
    encoder = BagOfWordsQueryEncoder.from_texts(texts, make_tokenizer(), VOCAB_SIZE)
    encoder.encode(texts, show_progress=False)
    assert caplog.text == ""
    counted = encoder.weight[encoder.tokenizer.convert_tokens_to_ids(["quick", "fox"])]
    torch.testing.assert_close(counted, torch.tensor([4 / 3, 4 / 3]).log())


@pytest.mark.parametrize("frozen", [True, False])
def test_saved_folders_load_again_and_in_sentence_transformers(frozen, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    settings = EncoderSettings(max_length=5, prompts={"query": "a "}, default_prompt_name="query")
    encoder = make_encoder(settings=settings, frozen=frozen)
    encoder.save_pretrained(tmp_path / "saved")
    again = sf.BagOfWordsQueryEncoder.from_pretrained(tmp_path / "saved")
    expected = encoder.encode(TEXTS, show_progress=False)
    assert again.encode(TEXTS, show_progress=False).equal(expected)
    assert again.weight.requires_grad == (not frozen)
    theirs = sentence_transformers.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    vectors = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    torch.testing.assert_close(expected.to_dense(), vectors)
    assert encoder.tokenizer.model_max_length == 64  # untouched


def test_sentence_transformers_folders_load(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    module = SparseStaticEmbedding(make_tokenizer(), torch.rand(VOCAB_SIZE), frozen=True)
    theirs = sentence_transformers.SparseEncoder(modules=[module], device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = BagOfWordsQueryEncoder.from_pretrained(tmp_path / "theirs")
    expected = theirs.encode(TEXTS, show_progress_bar=False).to_dense()
    torch.testing.assert_close(mine.encode(TEXTS, show_progress=False).to_dense(), expected)
    assert not mine.weight.requires_grad


def test_weights_in_json_and_a_subfolder_load(tmp_path):
    folder = tmp_path / "query_0"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"frozen": True, "path": "idf.json"}))
    (folder / "idf.json").write_text(json.dumps({"fox": 2.5, "dog": 1.5}))
    encoder = BagOfWordsQueryEncoder.from_pretrained(tmp_path, subfolder="query_0")
    terms = encoder.top_terms(encoder.encode("the dog and the fox", show_progress=False))
    assert terms == [{"fox": 2.5, "dog": 1.5}]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weight must be \(vocabulary,\) with at least"):
        BagOfWordsQueryEncoder(make_tokenizer(), torch.ones(3))
    with pytest.raises(TypeError, match="weight must be one of float32"):
        BagOfWordsQueryEncoder(make_tokenizer(), torch.ones(VOCAB_SIZE, dtype=torch.int64))
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must list a SparseStaticEmbedding alone, got nothing"):
        BagOfWordsQueryEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got dtype"):
        BagOfWordsQueryEncoder.from_pretrained(tmp_path, dtype=torch.float32)
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "saved")
    weights = next((tmp_path / "saved").rglob("model.safetensors"))
    save_file({"bias": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match=r"model.safetensors must hold weight, got bias"):
        BagOfWordsQueryEncoder.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\) = \(1, 2\)"):
        encoder(torch.tensor([[5, 6]]), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("quick fox", TypeError, "texts must be several texts, got a single str"),
        ([], ValueError, "texts must hold at least one text, got none"),
        (["fox", None], TypeError, r"texts\[1\] must be a str, got NoneType"),
        (["\ud800"], ValueError, r"texts\[0\] must be Unicode text, got the lone surrogate"),
    ],
)
def test_frequencies_need_texts(texts, error, message):
    with pytest.raises(error, match=message):
        BagOfWordsQueryEncoder.from_texts(texts, make_tokenizer())
