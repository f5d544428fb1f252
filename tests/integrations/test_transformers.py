"""accelerate: a transformers model whose forward returns pooled vectors."""

import copy
import inspect
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForMaskedLM

import splade_fast as sf
from splade_fast import reference
from splade_fast.integrations.transformers import PooledOutput
from tests.integrations.sparse_encoders import splade
from tests.ranks import run_ranks
from tests.tiny_models import (
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
    softcapped_config,
    tied_weights,
)
from tests.tolerances import assert_accurate, assert_accurate_gradients

FAMILIES = {**masked_lm_configs(), **causal_lm_configs()}
TEXTS = ["quick fox", "the lazy dog sleeps under an old tree", "unknownword", "a quick dog"]
LORA = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": False}


@pytest.fixture
def inputs():
    return dict(make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))


@pytest.fixture
def bert():
    return make_model(copy.deepcopy(FAMILIES["bert"]))


def by_reference(model, inputs, **options):
    return reference.splade_pool(model(**inputs).logits, inputs["attention_mask"], **options)


def trained(model, vectors):
    """Return vectors, and the gradients of all parameters that have one, by name."""
    model.zero_grad()
    upstream = torch.linspace(0.1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
    vectors.backward(upstream.to(vectors.dtype))
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert named
    return vectors.detach(), named


def assert_same(ours, baseline, truth):
    assert_accurate(ours[0], truth[0], baseline[0])
    assert_accurate_gradients(ours[1], truth[1], baseline[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_are_those_of_the_models_own_logits(family, inputs):
    model = make_model(FAMILIES[family])
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert sf.accelerate(model) is model
    output = model(**inputs)
    assert list(output) == ["pooled"]
    assert_same(
        trained(model, output.pooled),
        trained(plain, by_reference(plain, inputs)),
        trained(exact, by_reference(exact, inputs)),
    )


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu", "log1p_log1p_relu"])
def test_options(bert, inputs, pooling, activation):
    expected = by_reference(bert, inputs, pooling=pooling, activation=activation)
    sf.accelerate(bert)
    sf.accelerate(bert, pooling=pooling, activation=activation)  # changes the options
    torch.testing.assert_close(bert(**inputs).pooled, expected)


def test_inputs_of_every_kind(bert, inputs):
    plain = copy.deepcopy(bert)
    sf.accelerate(bert)
    expected = bert(**inputs).pooled
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(bert(ids, mask).pooled, expected)
    embeddings = bert.get_input_embeddings()(ids)
    assert torch.equal(bert(inputs_embeds=embeddings, attention_mask=mask).pooled, expected)
    assert torch.equal(bert(**inputs, return_dict=False)[0], expected)
    assert torch.equal(bert(**inputs)[0], expected)
    everything = reference.splade_pool(plain(ids).logits)
    torch.testing.assert_close(bert(ids).pooled, everything)
    kept = torch.ones_like(ids)
    kept[:, :2] = 0
    pooled = bert(**inputs, pooling_mask=kept).pooled
    torch.testing.assert_close(pooled, reference.splade_pool(plain(**inputs).logits, mask * kept))
    assert torch.equal(
        bert(inputs_embeds=embeddings, attention_mask=mask, pooling_mask=kept).pooled, pooled
    )
    torch.testing.assert_close(
        bert(ids, pooling_mask=kept).pooled, reference.splade_pool(plain(ids).logits, kept)
    )


def test_inputs_that_need_the_rest_of_the_forward_are_refused(bert, inputs):
    sf.accelerate(bert)
    bert(**inputs, labels=None, output_hidden_states=False)
    asked = {"labels": inputs["input_ids"], "output_hidden_states": True, "output_attentions": True}
    for name, value in asked.items():
        with pytest.raises(ValueError, match=f"{name} must be left out: an accelerated BertFor"):
            bert(**inputs, **{name: value})
    with pytest.raises(ValueError, match=r"pooling_mask must be \(batch, length\) = \(4, "):
        bert(**inputs, pooling_mask=torch.ones(1, 1))
    with pytest.raises(TypeError, match="positional arguments, got 100"):
        bert(*[None] * 100)


def test_restore_gives_the_models_own_forward_back(bert, inputs):
    expected = bert(**inputs).logits
    before = dict(bert.__dict__)
    sf.accelerate(bert)
    bert(**inputs)
    sf.restore(bert)
    assert bert.__dict__ == before
    assert not bert.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(bert(**inputs).logits, expected)
    with pytest.raises(ValueError, match="must be one that splade_fast.accelerate changed"):
        sf.restore(bert)


def test_a_forward_that_sat_on_the_model_is_kept(bert, inputs):
    calls = []
    own = bert.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    bert.forward = counted
    expected = by_reference(bert, inputs)
    sf.accelerate(bert)
    calls.clear()
    torch.testing.assert_close(bert(**inputs).pooled, expected)
    assert calls == [1]
    sf.restore(bert)
    assert bert.forward is counted


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_saved_files_do_not_change(family, inputs, tmp_path):
    model = make_model(FAMILIES[family])
    model.save_pretrained(tmp_path / "before")
    sf.accelerate(model)
    model(**inputs)
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    assert len(list((tmp_path / "after").iterdir())) == len(list((tmp_path / "before").iterdir()))


def test_the_model_stays_what_it_was(bert, inputs):
    signature = inspect.signature(bert.forward)
    names, kind = list(bert.state_dict()), type(bert)
    seen = []
    bert.register_forward_hook(lambda module, args, output: seen.append(output))
    sf.accelerate(bert)
    seen.clear()  # drop the outputs of accelerate's own check
    bert(**inputs)
    assert len(seen) == 1
    assert isinstance(seen[0], PooledOutput)
    assert inspect.signature(bert.forward) == signature
    assert list(bert.state_dict()) == names
    assert type(bert) is kind
    assert tied_weights(bert)


def test_copies_are_accelerated_on_their_own(bert, inputs):
    sf.accelerate(bert)
    expected = bert(**inputs).pooled
    for twin in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        with torch.no_grad():
            twin.get_output_embeddings().bias += 1
        assert not torch.allclose(twin(**inputs).pooled, expected)
        assert torch.equal(bert(**inputs).pooled, expected)
        sf.restore(twin)
        assert "logits" in twin(**inputs)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("accelerated_first", [True, False])
def test_adapters(family, accelerated_first, inputs):
    model = make_model(FAMILIES[family])
    if accelerated_first:
        sf.accelerate(model)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**LORA))
    if not accelerated_first:
        sf.accelerate(wrapped)
    wrapped.eval()
    ours = trained(wrapped, wrapped(**inputs).pooled)
    assert all("lora_" in name for name in ours[1])
    sf.restore(wrapped)
    exact = copy.deepcopy(wrapped).double()
    assert_same(
        ours,
        trained(wrapped, by_reference(wrapped, inputs)),
        trained(exact, by_reference(exact, inputs)),
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(bert, inputs, use_reentrant):
    sf.accelerate(bert)
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bert.train()
    expected = trained(bert, bert(**inputs).pooled)
    runs = []
    bert.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda *_: runs.append(1))
    bert.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = trained(bert, bert(**inputs).pooled)
    assert len(runs) == 2  # the backward runs the layer again
    assert torch.equal(actual[0], expected[0])
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, expected[1][name]), name


def test_autocast(bert, inputs):
    plain, exact = copy.deepcopy(bert), copy.deepcopy(bert).double()
    sf.accelerate(bert)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = bert(**inputs).pooled
        baseline = by_reference(plain, inputs).float()
    assert vectors.dtype == torch.float32
    assert_same(
        trained(bert, vectors),
        trained(plain, baseline),
        trained(exact, by_reference(exact, inputs)),
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiles_whole(family, inputs):
    torch.compiler.reset()
    model = sf.accelerate(make_model(FAMILIES[family]))
    expected = trained(model, model(**inputs).pooled)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = trained(model, compiled(**inputs).pooled)
    torch.testing.assert_close(actual[0], expected[0])
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-4)
    sf.restore(compiled)
    assert "logits" in model(**inputs)


def _steps_of_a_rank(rank, count, inputs):
    model = make_model(FAMILIES["bert"]).double()
    sf.accelerate(model)
    parallel = DistributedDataParallel(model)
    mine = {name: tensor[rank::count] for name, tensor in inputs.items()}
    for _ in range(2):
        model.zero_grad()
        parallel(**mine).pooled.sum().backward()
    whole = make_model(FAMILIES["bert"]).double()
    (by_reference(whole, inputs).sum() / count).backward()
    for mine, joined in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, joined.grad)


def test_two_processes_train_as_one(inputs, tmp_path):
    run_ranks(2, _steps_of_a_rank, tmp_path, inputs)


def test_a_sparse_encoder_is_sent_to_the_function_that_takes_it(tmp_path):
    with pytest.raises(TypeError, match="got SparseEncoder, which .*transformers.accelerate takes"):
        sf.accelerate(splade(tmp_path))


def test_models_that_do_not_fit_are_refused_and_left_alone(bert, inputs):
    capped = make_model(softcapped_config())
    before = dict(capped.__dict__)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM must have the logits"):
        sf.accelerate(capped)
    assert capped.__dict__ == before
    with pytest.raises(ValueError, match=r"Linear, got builtins.NoneType"):
        sf.accelerate(bert.bert)
    with pytest.raises(TypeError, match="must be a transformers language model, got Linear"):
        sf.accelerate(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="pooling must be one of"):
        sf.accelerate(bert, pooling="min")
    assert "logits" in bert(**inputs)


def test_models_that_return_tuples(bert, inputs):
    expected = by_reference(bert, inputs)
    bert.config.return_dict = False
    (pooled,) = sf.accelerate(bert)(**inputs)
    torch.testing.assert_close(pooled, expected)
    assert torch.equal(bert(**inputs, return_dict=True).pooled, pooled)


def test_training_changes_what_a_plain_model_loads(inputs, tmp_path):
    folder = save_checkpoint(FAMILIES["bert"], tmp_path / "start")
    model = sf.accelerate(AutoModelForMaskedLM.from_pretrained(folder))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**inputs).pooled.sum().backward()
    optimizer.step()
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "trained").eval()
    torch.testing.assert_close(by_reference(plain, inputs), model(**inputs).pooled)
