import pytest
import torch

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.texts import DataError
from splade_fast.training import TrainingCollator
from tests.tiny_models import make_model, make_tokenizer, masked_lm_configs

HARD = [
    {"query": "quick fox", "document": "a b fox", "negatives": ["dog", "tree"]},
    {"query": "lazy", "document": "the lazy dog sleeps", "negatives": ["fox", "an old tree"]},
]


def make_encoder(settings=None):
    return SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer(), settings)


def words(tokens):
    """The rows of token tensors as text again."""
    tokenizer = make_tokenizer()
    return tokenizer.batch_decode(tokens["input_ids"], skip_special_tokens=True)


def test_document_j_of_query_i_is_row_j_times_b_plus_i():
    batch = TrainingCollator(make_encoder())(HARD)
    assert words(batch["queries"]) == ["quick fox", "lazy"]
    assert words(batch["documents"])[1:] == [
        "the lazy dog sleeps",
        "dog",
        "fox",
        "tree",
        "an old tree",
    ]
    assert "labels" not in batch
    mask = batch["documents"]["attention_mask"]
    assert mask.sum(1).tolist() == [5, 6, 3, 3, 3, 5]  # with [CLS] and [SEP]
    assert mask.shape[1] == 6  # the longest of the batch


@pytest.mark.parametrize("count", [1, 2])
def test_first_negatives_are_taken(count):
    batch = TrainingCollator(make_encoder(), negatives_per_query=count)(HARD)
    assert len(words(batch["documents"])) == 2 * (1 + count)
    assert words(batch["documents"])[2:4] == ["dog", "fox"]


def test_pairs_and_labels():
    pairs = [{"query": "fox", "document": "dog"}] * 3
    collator = TrainingCollator(make_encoder(), negatives_per_query=2)  # which pairs have none of
    batch = collator(pairs)
    assert words(batch["documents"]) == ["dog"] * 3
    labelled = [{**pair, "label": label} for pair, label in zip(pairs, (0, 0.5, 1), strict=True)]
    assert torch.equal(collator(labelled)["labels"], torch.tensor([0, 0.5, 1]))


def test_scored_lists():
    examples = [
        {"query": "fox", "documents": ["a", "dog", "tree"], "scores": [3.0, 2.0, 1.0]},
        {"query": "dog", "documents": ["the", "fox"], "scores": [1.0, 0.0]},
    ]
    batch = TrainingCollator(make_encoder(), negatives_per_query=1)(examples)
    assert words(batch["documents"]) == ["a", "the", "dog", "fox"]
    assert torch.equal(batch["labels"], torch.tensor([[3.0, 2.0], [1.0, 0.0]]))
    with pytest.raises(DataError, match="equally many documents, got 2 and 3; negatives_per_query"):
        TrainingCollator(make_encoder())(examples)
    examples[0]["scores"] = [1.0]
    with pytest.raises(DataError, match="expected 3 scores, one per document, got 1"):
        TrainingCollator(make_encoder())(examples)


def test_lengths_and_prompts():
    prompts = {"query": "quick ", "document": "brown ", "other": "lazy "}
    encoder = make_encoder(EncoderSettings(prompts=prompts))
    pairs = [{"query": "fox jumps over the dog", "document": "old tree sleeps"}]
    batch = TrainingCollator(encoder, max_query_length=5, max_document_length=4)(pairs)
    assert words(batch["queries"]) == ["quick fox jumps"]
    assert words(batch["documents"]) == ["brown old"]
    named = TrainingCollator(encoder, query_prompt="other", document_prompt="query")(pairs)
    assert words(named["queries"])[0].startswith("lazy fox")
    assert words(named["documents"])[0].startswith("quick old")
    limited = TrainingCollator(make_encoder(EncoderSettings(max_length=3)))(pairs)
    assert limited["documents"]["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="prompt_name must be one of .* got 'no'"):
        TrainingCollator(encoder, query_prompt="no")


def test_tokens_are_those_that_encode_makes():
    encoder = make_encoder()
    batch = TrainingCollator(encoder)(HARD)
    for name, tensor in encoder.tokenize(["quick fox", "lazy"]).items():
        assert torch.equal(batch["queries"][name], tensor)
    queries = BagOfWordsQueryEncoder(make_tokenizer())
    batch = TrainingCollator(encoder, queries)(HARD)
    for name, tensor in queries.tokenize(["quick fox", "lazy"]).items():
        assert torch.equal(batch["queries"][name], tensor)


def test_bad_batches():
    collator = TrainingCollator(make_encoder(), negatives_per_query=3)
    with pytest.raises(DataError, match="at least negatives_per_query = 3 negatives, got 2"):
        collator(HARD)
    with pytest.raises(DataError, match="all examples of a batch must be hard negatives"):
        collator([HARD[0], {"query": "fox", "document": "dog"}])
    with pytest.raises(DataError, match="at least one example"):
        collator([])
    with pytest.raises(DataError, match="expected the columns of load_training_data"):
        collator([{"text": "fox"}])
    for argument in ("max_query_length", "max_document_length", "negatives_per_query"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
            TrainingCollator(make_encoder(), **{argument: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "query of example 1 of the batch must be text, got None"),
        ({"document": ["fox", "dog"]}, "document of example 1 .* must be text, got .'fox', 'dog'"),
        ({"document": 7}, "document of example 1 of the batch must be text, got 7"),
        ({"document": "\ud800"}, "document of example 1 .* must be Unicode text, got the lone"),
        ({"negatives": "dog tree"}, "negatives of example 1 .* a list of texts, got 'dog tree'"),
        (
            {"negatives": ["dog", None]},
            "negatives of example 1 of the batch must be text, got None",
        ),
    ],
)
def test_parts_that_are_no_texts_are_named(changes, message):
    collator = TrainingCollator(make_encoder())
    with pytest.raises(ValueError, match=message):
        collator([HARD[0], HARD[1] | changes])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"query": "a", "document": "fox", "label": None}], "label must be numbers, got None"),
        ([{"query": "a", "document": "fox", "label": float("nan")}], "label must be finite"),
        ([{"query": "a", "document": "fox", "label": 2}], "label must be one number from 0 to 1"),
        ([{"query": "a", "documents": "ab", "scores": [1, 0]}], "documents of .* a list of texts"),
        ([{"query": "a", "documents": ["a", "b"], "scores": [1, None]}], "scores must be numbers"),
    ],
)
def test_bad_labels_are_named(examples, message):
    with pytest.raises(DataError, match=message):
        TrainingCollator(make_encoder())(examples)


def test_tokens_that_the_model_lacks_are_named():
    encoder = make_encoder()
    encoder.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="the 20 tokens of the model, got the token 'zebra' with"):
        TrainingCollator(encoder)([{"query": "zebra", "document": "fox"}])


def test_a_prompt_leaves_room_for_texts():
    encoder = make_encoder(EncoderSettings(prompts={"query": "a quick brown "}))
    TrainingCollator(encoder, max_query_length=6)
    with pytest.raises(ValueError, match=r"max_query_length must be more than .*'a quick brown '"):
        TrainingCollator(encoder, max_query_length=5)
