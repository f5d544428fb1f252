"""Threads that share a model or a tokenizer get what one thread gets."""

import copy
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event, current_thread

import pytest
import torch

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.hidden_states import hidden_before_decoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.encoders.threads import tokenizer_lock
from splade_fast.search.texts import Texts
from splade_fast.training import RetrievalEvaluator
from tests.tiny_models import WORDS, make_model, make_tokenizer, masked_lm_configs

LENGTHS = [3, 5, 9, 14]
TEXT = " ".join(WORDS)


pytestmark = pytest.mark.usefixtures("often_switching_threads")


def make_splade(tokenizer=None):
    return SpladeEncoder(make_model(masked_lm_configs()["bert"]), tokenizer or make_tokenizer())


def make_term_weights():
    return TermWeightEncoder(make_model(masked_lm_configs()["bert"]).base_model, make_tokenizer())


def encode(encoder, length):
    return encoder.encode([TEXT, TEXT[:20]], max_length=length, show_progress=False)


def in_threads(function, arguments, repetitions=12):
    """Return the results for the arguments, each computed many times by several threads."""
    jobs = arguments * repetitions
    with ThreadPoolExecutor(8) as pool:
        return list(zip(jobs, pool.map(function, jobs), strict=True))


@pytest.mark.parametrize(
    "make",
    [make_splade, make_term_weights, lambda: BagOfWordsQueryEncoder(make_tokenizer())],
    ids=["splade", "term_weights", "bag_of_words"],
)
def test_each_call_has_its_own_length_and_the_mode_stays(make):
    encoder = make().train()
    expected = {length: encode(encoder, length) for length in LENGTHS}
    for length, rows in in_threads(lambda length: encode(encoder, length), LENGTHS):
        assert rows.equal(expected[length])
    assert all(module.training for module in encoder.modules())


def test_encoders_share_a_tokenizer_and_its_copies():
    splade = make_splade()
    shallow = make_splade(copy.copy(splade.tokenizer))
    bag = BagOfWordsQueryEncoder(splade.tokenizer)
    pairs = [(encoder, length) for encoder in (splade, shallow, bag) for length in LENGTHS]
    expected = [encode(*pair) for pair in pairs]
    found = in_threads(lambda i: encode(*pairs[i]), list(range(len(pairs))), 10)
    assert all(rows.equal(expected[i]) for i, rows in found)


def test_frequencies_are_counted_while_others_tokenize():
    splade = make_splade()
    texts = [TEXT, " ".join(WORDS[:5])]
    expected = BagOfWordsQueryEncoder.from_texts(texts, splade.tokenizer).weight

    def count(length):
        if length == 3:
            return BagOfWordsQueryEncoder.from_texts(texts, splade.tokenizer).weight
        return encode(splade, length)

    for length, weight in in_threads(count, [3, 5]):
        assert length != 3 or torch.equal(weight, expected)


def test_copies_of_an_encoder_work_while_the_encoder_is_in_use():
    encoder = make_splade()
    expected = encode(encoder, 9)

    def copied(way):
        return encode(way(encoder), 9)

    ways = [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))]
    assert all(rows.equal(expected) for _, rows in in_threads(copied, ways, 4))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    """Data loaders fork processes, which tokenize, while other threads tokenize as well."""
    encoder = make_splade()
    is_held, may_end = Event(), Event()

    def hold():
        with tokenizer_lock(encoder.tokenizer):
            is_held.set()
            may_end.wait(20)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        is_held.wait(10)
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # ends a process that waits
            is_right = encoder.tokenize([TEXT], 9)["input_ids"].shape == (1, 9)
            os._exit(0 if is_right else 1)
        _, status = os.waitpid(child, 0)
        may_end.set()
    assert status == 0


def test_a_copy_made_inside_a_forward_is_stopped_by_no_hook():
    model = make_model(masked_lm_configs()["bert"])
    copies = []

    def make_a_copy(*_):
        copies.append(copy.deepcopy(model))

    handle = model.base_model.register_forward_pre_hook(make_a_copy)
    inputs = {"input_ids": torch.tensor([[2, 6, 3]])}
    hidden_before_decoder(model, **inputs)
    handle.remove()
    copies[0].base_model._forward_pre_hooks.clear()
    assert torch.equal(copies[0](**inputs).logits, model(**inputs).logits)


def test_the_last_of_several_threads_restores_the_modes():
    """One thread ends while the other is inside, and dropout stays off until both have ended."""
    encoder = make_splade().train()
    frozen = encoder.model.base_model.embeddings.dropout.eval()
    modes = {name: module.training for name, module in encoder.named_modules()}
    is_inside, others_left = Event(), Event()
    seen = []

    def wait(*_):
        is_inside.set()
        others_left.wait(10)
        seen.append(any(module.training for module in encoder.modules()))

    with ThreadPoolExecutor(2) as pool:
        handle = encoder.model.register_forward_pre_hook(wait)
        slow = pool.submit(encode, encoder, 9)
        is_inside.wait(10)
        handle.remove()
        other = SpladeEncoder(encoder.model, encoder.tokenizer)  # checks the model, in its mode
        fast = pool.submit(encode, other, 9).result()
        others_left.set()
        assert slow.result().equal(fast)
    assert seen == [False]
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert not frozen.training


def test_an_encoder_can_be_made_of_a_model_in_use():
    """One thread passes the decoder while another checks it with hidden states of its own."""
    encoder = make_splade()
    inputs = encoder.tokenize([TEXT])
    expected = encoder.model(**inputs).logits
    main, is_inside, is_checking = current_thread(), Event(), Event()
    forwards = []

    def meet(*_):
        if current_thread() is not main:
            is_inside.set()
            is_checking.wait(10)
            return
        forwards.append(1)
        if len(forwards) == 2:  # the one whose logits are checked
            is_checking.set()
            found.append(slow.result(10))

    found = []
    encoder.model.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: encoder.model(**inputs).logits)
        is_inside.wait(10)
        SpladeEncoder(encoder.model, encoder.tokenizer)
    assert torch.equal(found[0], expected)


def test_evaluators_in_threads():
    encoder = make_splade().train()
    corpus = Texts([str(i) for i in range(12)], [" ".join(WORDS[i:]) for i in range(12)])
    queries = Texts(["q"], ["the lazy dog"])
    evaluators = [
        RetrievalEvaluator(queries, corpus, {"q": {"9": 1}}, max_document_length=length)
        for length in LENGTHS
    ]
    expected = [evaluator(encoder) for evaluator in evaluators]
    found = in_threads(lambda i: evaluators[i](encoder), list(range(len(LENGTHS))), 5)
    assert all(metrics == expected[i] for i, metrics in found)
    assert all(module.training for module in encoder.modules())
