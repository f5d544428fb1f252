import pytest
import torch

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.lines import DataError, DataWarning
from splade_fast.search.texts import Texts
from splade_fast.training import RetrievalEvaluator
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs

OTHER = {"a": "lazy dog", "lazy": "tree"}
CORPUS = Texts([f"d{i}" for i in range(len(WORDS))], [OTHER.get(word, word) for word in WORDS])
QUERIES = Texts(["fox", "dog", "unjudged"], ["fox", "lazy dog", "tree"])
QRELS = {"fox": {f"d{WORDS.index('fox')}": 1}, "dog": {f"d{WORDS.index('dog')}": 1, "d0": 0}}


def bag_of_words():
    return BagOfWordsQueryEncoder(make_tokenizer()).eval()


def test_perfect_and_known_figures():
    """Bags of words: "fox" finds its document first, "lazy dog" another one before."""
    metrics = RetrievalEvaluator(QUERIES, CORPUS, QRELS)(bag_of_words(), prefix="eval_")
    assert metrics == {
        "eval_MRR@10": pytest.approx((1 + 1 / 2) / 2),
        "eval_nDCG@10": pytest.approx((1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 2),
        "eval_Recall@100": 1.0,
        "eval_query_active_dims": 1.5,  # without the query that nobody judged
        "eval_document_active_dims": pytest.approx(1 + 1 / len(CORPUS)),
        "eval_index_mib": pytest.approx(len(CORPUS) * (2 * 8 + 4) / 2**20),
    }


def test_the_two_encoders_have_their_own_sides():
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    evaluator = RetrievalEvaluator(QUERIES, CORPUS, QRELS, document_top_k=3)
    own = evaluator(encoder)
    assert own["query_active_dims"] > 3
    assert own["document_active_dims"] == 3
    mixed = evaluator(encoder, bag_of_words())
    assert mixed["query_active_dims"] == 1.5
    assert mixed["document_active_dims"] == 3
    assert (
        RetrievalEvaluator(QUERIES, CORPUS, QRELS, query_top_k=2)(encoder)["query_active_dims"] == 2
    )


def test_figures_are_those_of_a_search_by_hand():
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    metrics = RetrievalEvaluator(QUERIES, CORPUS, QRELS)(encoder)
    queries = encoder.encode(QUERIES.texts[:2], show_progress=False)
    documents = encoder.encode(CORPUS.texts, show_progress=False)
    scores = queries.to_dense() @ documents.to_dense().T
    own = torch.tensor([WORDS.index("fox"), WORDS.index("dog")])
    ranks = 1 + (scores > scores.gather(1, own[:, None])).sum(1)
    expected = torch.where(ranks <= 10, 1 / ranks, 0).mean().item()
    assert metrics["MRR@10"] == pytest.approx(expected)


def test_prompts_by_name_or_by_role():
    prompts = {"query": "old ", "ask": "tree ", "passage": "under "}
    settings = EncoderSettings(prompts=prompts)
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer(), settings)

    def dims(query_prompt: str | None, document_prompt: str | None) -> tuple[float, float]:
        found = RetrievalEvaluator(
            QUERIES, CORPUS, QRELS, query_prompt=query_prompt, document_prompt=document_prompt
        )(encoder)
        return found["query_active_dims"], found["document_active_dims"]

    def encoded(texts: list[str], prompt: str) -> float:
        rows = encoder.encode([prompt + text for text in texts], show_progress=False)
        return rows.lengths.float().mean().item()

    queries, documents = QUERIES.texts[:2], CORPUS.texts
    assert dims(None, None) == (encoded(queries, "old "), encoded(documents, ""))
    assert dims("ask", "passage") == (encoded(queries, "tree "), encoded(documents, "under "))
    assert len({encoded(queries, prompt) for prompt in ("", "old ", "tree ")}) == 3


def test_the_mode_of_the_encoder_stays():
    encoder = SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer())
    encoder.train()
    RetrievalEvaluator(QUERIES, CORPUS, QRELS)(encoder)
    assert encoder.training


def test_files(tmp_path):
    (tmp_path / "q.tsv").write_text("q1\tfox\n")
    (tmp_path / "c.tsv").write_text("d1\tfox\nd2\tdog\n")
    (tmp_path / "r.txt").write_text("q1 0 d1 1\n")
    paths = tmp_path / "q.tsv", tmp_path / "c.tsv", tmp_path / "r.txt"
    evaluator = RetrievalEvaluator.from_files(*paths, batch_size=1)
    assert evaluator(bag_of_words())["MRR@10"] == 1


def test_judgements_of_other_queries_and_documents():
    """Other queries do not count; other documents count as not retrieved."""
    qrels = QRELS | {"q9": {"d1": 1}, "fox": QRELS["fox"] | {"d99": 1}}
    with pytest.warns(DataWarning) as warned:
        evaluator = RetrievalEvaluator(QUERIES, CORPUS, qrels)
    assert [str(warning.message) for warning in warned] == [
        "1 of 3 judged queries are not among the queries",
        "1 of 4 judged documents are not in the corpus, and count as not retrieved",
    ]
    metrics = evaluator(bag_of_words())
    assert metrics["Recall@100"] == (1 / 2 + 1) / 2
    assert metrics["MRR@10"] == (1 + 1 / 2) / 2
    with pytest.raises(DataError, match="qrels must judge at least one of the queries, got 'q9'"):
        RetrievalEvaluator(QUERIES, CORPUS, {"q9": {"d1": 1}})
    with pytest.raises(DataError, match="at least one query"):
        RetrievalEvaluator(QUERIES, CORPUS, {})


def test_the_document_of_the_query_is_ignored_on_request():
    texts = Texts(["a", "b"], ["lazy dog", "dog"])
    qrels = {"a": {"b": 1}, "b": {"a": 1}}
    encoder = bag_of_words()
    assert RetrievalEvaluator(texts, texts, qrels)(encoder)["MRR@10"] == (1 / 2 + 1) / 2
    evaluator = RetrievalEvaluator(texts, texts, qrels, ignore_identical_ids=True)
    assert evaluator(encoder)["MRR@10"] == 1


def test_texts_without_known_words_find_nothing_and_are_warned_of():
    texts = Texts(["a", "b"], ["fox", ""])
    with pytest.warns(DataWarning, match="1 of 2 queries and 1 of 2 documents have empty vectors"):
        metrics = RetrievalEvaluator(texts, texts, {"a": {"a": 1}, "b": {"b": 1}})(bag_of_words())
    assert metrics["MRR@10"] == metrics["Recall@100"] == 1 / 2


def test_an_empty_corpus_is_refused():
    with pytest.raises(DataError, match="corpus must hold at least one document, got none"):
        RetrievalEvaluator(Texts(["q1"], ["fox"]), Texts([], []), {"q1": {"d1": 1}})


def test_dicts_of_texts_are_refused():
    """The evaluators of sentence-transformers take them."""
    texts = Texts(["d1"], ["fox"])
    with pytest.raises(TypeError, match="queries must be Texts, got dict"):
        RetrievalEvaluator({"q1": "fox"}, texts, {"q1": {"d1": 1}})
    with pytest.raises(TypeError, match="corpus must be Texts, got dict"):
        RetrievalEvaluator(Texts(["q1"], ["fox"]), {"d1": "fox"}, {"q1": {"d1": 1}})
