"""Tests that an accelerated SparseEncoder keeps its results and its saved files."""

import copy
import pickle
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import (
    MLMTransformer,
    SparseAutoEncoder,
    SpladePooling,
)
from transformers import DebertaV2Config

from splade_fast.encoders.hidden_states import find_decoder
from splade_fast.integrations.sentence_transformers import accelerate, modules, restore
from tests.adapters import WAYS, lora
from tests.integrations.sparse_encoders import (
    FAMILIES,
    TEXTS,
    inference_free,
    sentences,
    splade,
    static_embedding,
    transformer_of,
)
from tests.selection import pairwise
from tests.tiny_models import VOCAB_SIZE, WORDS, make_tokenizer, save_checkpoint
from tests.tolerances import assert_accurate, assert_accurate_gradients

POOLINGS = [
    {"pooling_strategy": pooling, "activation_function": activation}
    for pooling in ("max", "sum")
    for activation in ("relu", "log1p_relu")
]


def encoded(model, texts=TEXTS, **options):
    vectors = model.encode(texts, show_progress_bar=False, **options)
    return vectors.to_dense() if isinstance(vectors, torch.Tensor) else vectors


@contextmanager
def decoders_rest(model):
    """Fail if the decoder computes logits inside the block."""
    decoders = [find_decoder(m.model) for m in model.modules() if isinstance(m, Transformer)]
    handles = [
        decoder.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
        for decoder in decoders
    ]
    yield
    for handle in handles:
        handle.remove()


# So many that the largest error of plain PyTorch, which sets the tolerance, is not small by luck.
MANY_TEXTS = [*TEXTS, *sentences(35), *(" ".join(WORDS[i:] + WORDS[:i]) for i in range(14))]


def assert_same_vectors(model, texts=MANY_TEXTS, **options):
    """Accelerate the model, and compare its accuracy with the original by the tolerance policy."""
    restore(model)
    truth = encoded(copy.deepcopy(model).double(), texts, **options)
    before = encoded(model, texts, **options)
    with decoders_rest(accelerate(model)):
        after = encoded(model, texts, **options)
    assert_accurate(after, truth, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_pooling_and_activation(family, tmp_path):
    model = splade(tmp_path, family)
    for pooling in POOLINGS:
        vars(model[1]).update(pooling)
        assert_same_vectors(model, batch_size=3)
        assert_same_vectors(model, max_active_dims=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = splade(tmp_path).to(dtype)
    assert_same_vectors(model)
    assert encoded(model).dtype == dtype


def test_autocast(tmp_path):
    model = splade(tmp_path)
    exact = encoded(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = encoded(model).float()
        after = encoded(accelerate(model)).float()
    assert_accurate(after, exact.double(), before)
    assert not torch.equal(after, exact)


@pytest.mark.skipif(
    not hasattr(SpladePooling, "_forward_flattened"), reason="sentence-transformers 5.4 only pads"
)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("training", [True, False])
def test_flattened_input(pooling, training, tmp_path):
    model = splade(tmp_path, **pooling).double().train(training)
    model[0].model.eval()  # no dropout
    tokens = torch.randint(5, VOCAB_SIZE, (1, 9))
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)

    def vectors():
        features = {"input_ids": tokens, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return model(features)["sentence_embedding"]

    before = vectors()
    assert restore(accelerate(model)) is accelerate(model) is model
    after = vectors()
    torch.testing.assert_close(after, before)
    assert after.shape == (3, VOCAB_SIZE)


@pairwise(sparse=[True, False], k=[None, 3], save_to_cpu=[True, False])
def test_what_encode_returns(sparse, k, save_to_cpu, tmp_path):
    model = splade(tmp_path).double()
    options = {
        "convert_to_sparse_tensor": sparse,
        "max_active_dims": k,
        "save_to_cpu": save_to_cpu,
        "batch_size": 4,
    }

    def results():
        return [
            model.encode(TEXTS, **options),
            model.encode("quick fox", **options),
            model.encode_query(TEXTS, **options),
            model.encode_document(TEXTS, prompt="an old ", **options),
            model.encode(tuple(TEXTS), prompt_name="document", **options),
            *model.encode(TEXTS, convert_to_tensor=False, **options),
            model.encode([], **options),
        ]

    before = results()
    accelerate(model)
    after = results()
    for ours, theirs in zip(after, before, strict=True):
        assert (ours.layout, ours.dtype, ours.device) == (
            theirs.layout,
            theirs.dtype,
            theirs.device,
        )
        assert not ours.is_inference()
        if ours.is_sparse:
            assert ours.coalesce()._nnz() == theirs.coalesce()._nnz()
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense())


def test_max_active_dims_of_the_model(tmp_path):
    model = accelerate(splade(tmp_path))
    model.max_active_dims = 2
    assert (encoded(model) > 0).sum(1).max() == 2
    with pytest.raises(ValueError, match="max_active_dims must be a positive integer, got 0"):
        model.encode(TEXTS, max_active_dims=0)


def test_no_dense_matrix_when_pruning(tmp_path, monkeypatch):
    """Check that the pooling returns sparse rows even for one batch."""
    model = accelerate(splade(tmp_path))
    monkeypatch.setattr(modules, "splade_head", lambda *_, **__: pytest.fail("a dense matrix"))
    assert model.encode(TEXTS, max_active_dims=3)._nnz() <= 3 * len(TEXTS)
    assert model.encode(TEXTS)._nnz() > 0


def test_similarity_intersection_decode_and_sparsity(tmp_path):
    model = splade(tmp_path).double()

    def results():
        vectors = model.encode(TEXTS)
        shared = model.intersection(vectors[0], vectors)
        return (
            model.similarity(vectors, vectors),
            model.similarity_pairwise(vectors, vectors),
            shared.to_dense(),
            [dict(row) for row in model.decode(vectors, top_k=4)],
            model.sparsity(vectors),
            model.get_embedding_dimension(),
            model.get_model_kwargs(),
        )

    before = results()
    accelerate(model)
    for ours, theirs in zip(results(), before, strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs)
        elif isinstance(ours, list):
            assert [list(row) for row in ours] == [list(row) for row in theirs]
            assert ours == [pytest.approx(row) for row in theirs]
        else:
            assert ours == theirs


def test_pools_of_processes(tmp_path):
    model = accelerate(splade(tmp_path))
    alone = model.encode(sentences(12), max_active_dims=4)
    together = model.encode(sentences(12), device=["cpu", "cpu"], chunk_size=5, max_active_dims=4)
    torch.testing.assert_close(together.to_dense(), alone.to_dense())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_accelerated_and_restore_alone(duplicate, tmp_path):
    model = accelerate(splade(tmp_path))
    other = duplicate(model)
    assert torch.equal(encoded(other), encoded(model))
    assert isinstance(other[1], modules.HeadPooling)
    restore(model)
    assert isinstance(other[1], modules.HeadPooling)


def test_accelerate_and_restore_change_classes_in_place(tmp_path):
    model = splade(tmp_path)
    parts = [model, *model]
    classes = [type(part) for part in parts]
    shown = repr(model)
    for _ in range(2):  # the second call changes nothing
        assert accelerate(model) is model
    assert [model, *model] == parts
    for part, kind in zip(parts, classes, strict=True):
        assert isinstance(part, kind)
        assert type(part) is not kind
    assert repr(model) == shown
    assert not any("splade_fast" in key for key in model.state_dict())
    for _ in range(2):
        assert restore(model) is model
    assert [type(part) for part in parts] == classes
    hooks = [m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_logits_of_the_transformers_model_stay(tmp_path):
    model = accelerate(splade(tmp_path))
    inputs = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    encoded(model)
    assert model.transformers_model(**inputs).logits.shape[-1] == VOCAB_SIZE


def files_in(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("make", [splade, inference_free])
def test_saved_files_are_the_same(make, tmp_path):
    model = make(tmp_path)
    texts = {"task": "document"} if make is inference_free else {}
    encoded(model, **texts)
    model.save_pretrained(str(tmp_path / "earlier"))  # sets the name of the similarity
    model.save_pretrained(str(tmp_path / "before"))
    encoded(accelerate(model), **texts)
    model.save_pretrained(str(tmp_path / "after"))
    before, after = files_in(tmp_path / "before"), files_in(tmp_path / "after")
    assert before.keys() == after.keys()
    for name, path in before.items():
        if path.suffix == ".safetensors":
            weights, others = load_file(path), load_file(after[name])
            assert weights.keys() == others.keys()
            assert all(torch.equal(weights[key], others[key]) for key in weights)
        else:
            assert path.read_bytes() == after[name].read_bytes(), name
    again = SparseEncoder(str(tmp_path / "after"), device="cpu")
    assert not any(isinstance(module, modules.Role) for module in again.modules())
    torch.testing.assert_close(encoded(again, **texts), encoded(restore(model), **texts))


def test_inference_free_queries(tmp_path):
    model = inference_free(tmp_path).double()
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    pruned = model.encode_query(TEXTS, max_active_dims=1)
    accelerate(model)
    assert torch.equal(model.encode_query(TEXTS).to_dense(), queries.to_dense())
    assert torch.equal(model.encode_query(TEXTS, max_active_dims=1).to_dense(), pruned.to_dense())
    torch.testing.assert_close(model.encode_document(TEXTS).to_dense(), documents.to_dense())


def routed(folder, shared_pooling):
    """Return a Router of two transformers, each before its own pooling or both before one."""
    routes = {
        name: [transformer_of(folder, family)] + ([] if shared_pooling else [SpladePooling("sum")])
        for name, family in (("query", "bert"), ("document", "distilbert"))
    }
    router = Router.for_query_document(routes["query"], routes["document"])
    after = [SpladePooling()] if shared_pooling else []
    return SparseEncoder(modules=[router, *after], device="cpu").eval()


@pytest.mark.parametrize("shared_pooling", [True, False])
def test_both_routes_of_a_router(shared_pooling, tmp_path):
    model = routed(tmp_path, shared_pooling)
    for task in ("query", "document"):
        assert_same_vectors(model, task=task)
        assert_same_vectors(model, task=task, max_active_dims=3)
    for module in model.modules():
        if isinstance(module, SpladePooling):
            assert isinstance(module, modules.HeadPooling)
        if isinstance(module, Transformer):
            assert isinstance(module, modules.HiddenTransformer)


def test_modules_behind_the_pooling_get_dense_vectors(tmp_path):
    pair = [transformer_of(tmp_path), SpladePooling()]
    model = SparseEncoder(modules=[*pair, static_embedding()], device="cpu").eval()
    assert_same_vectors(model, max_active_dims=3)
    assert_same_vectors(model)


def test_legacy_transformer_module(tmp_path):
    folder = save_checkpoint(FAMILIES["bert"], tmp_path / "bert")
    pair = [MLMTransformer(str(folder)), SpladePooling()]
    assert_same_vectors(SparseEncoder(modules=pair, device="cpu"))


def add_adapters(model, way, **options):
    if way == "add_adapter":
        model.add_adapter(lora(**options))
    else:
        model[0].model = get_peft_model(model[0].model, lora(**options))


def disable_adapters(model, way):
    if way == "add_adapter":
        model.disable_adapters()
    else:
        model[0].model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("first", ["accelerate", "adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters(first, way, tmp_path):
    model = splade(tmp_path)
    if first == "accelerate":
        accelerate(model)
    add_adapters(model, way, init_lora_weights=False)
    with_adapter = encoded(model.eval())
    assert_same_vectors(model)
    disable_adapters(restore(model), way)
    assert not torch.allclose(encoded(model), with_adapter)
    assert_same_vectors(model)


@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_the_decoder_are_refused(way, tmp_path):
    model = accelerate(splade(tmp_path))
    add_adapters(model, way, target_modules=["decoder"])
    with pytest.raises(ValueError, match="keep adapters off the decoder"):
        model.encode(TEXTS)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def gradients(model, features):
    model.zero_grad()
    vectors = model(dict(features))["sentence_embedding"]
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling, checkpointing, tmp_path):
    model = splade(tmp_path, **pooling)
    features = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    without_dropout(model)
    model.train()
    truth = gradients(copy.deepcopy(model).double(), features)
    before = gradients(model, features)
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_accurate_gradients(gradients(accelerate(model), features), truth, before)


def test_compiled_model(tmp_path):
    model = splade(tmp_path).double()
    features = dict(make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    without_dropout(model)
    before, plain = encoded(model), gradients(model.train(), features)
    accelerate(model).compile(backend="aot_eager", dynamic=True)
    torch.testing.assert_close(encoded(model), before)
    torch.testing.assert_close(encoded(model, max_active_dims=VOCAB_SIZE), before)
    torch.testing.assert_close(gradients(model.train(), features), plain)


def test_hidden_states_of_all_layers_stay(tmp_path):
    model = accelerate(splade(tmp_path))
    model.transformers_model.config.output_hidden_states = True
    features = dict(make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    assert len(model(features)["all_layer_embeddings"]) == 3


class OwnPooling(SpladePooling):
    def forward(self, features):
        return super().forward(features)


def make_encoder(*parts):
    return SparseEncoder(modules=list(parts), device="cpu")


def test_what_cannot_be_accelerated_is_refused_and_left_alone(tmp_path):
    transformer = transformer_of(tmp_path)
    bare = Transformer(str(tmp_path / "bert"))
    other_head = save_checkpoint(
        DebertaV2Config(**FAMILIES["deberta-v3"].to_diff_dict() | {"legacy": False}),
        tmp_path / "other",
    )
    both = Router(
        {"a": [transformer, SpladePooling()], "b": [transformer, Pooling(16)]}, default_route="a"
    )
    cases = {
        "must have a Transformer followed by SpladePooling": make_encoder(
            bare, Pooling(16), SparseAutoEncoder(input_dim=16, hidden_dim=32, k=4, k_aux=4)
        ),
        "OwnPooling must have the forward of SpladePooling": make_encoder(
            transformer, OwnPooling()
        ),
        "the Transformer must give logits": make_encoder(bare, SpladePooling()),
        "this family is not supported": make_encoder(
            Transformer(str(other_head), transformer_task="fill-mask"), SpladePooling()
        ),
        "each use of a Transformer must be followed by SpladePooling, got Pooling": make_encoder(
            both
        ),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            accelerate(model)
        assert not any(isinstance(module, modules.Role) for module in model.modules())
    with pytest.raises(TypeError, match="sparse_encoder must be a SparseEncoder, got Transformer"):
        accelerate(transformer)


def test_lone_surrogates_are_refused_by_name(tmp_path):
    model = accelerate(splade(tmp_path))
    for texts in (["fox", "\ud800"], ["\ud800"]):
        with pytest.raises(ValueError, match=r"inputs\[\d\] must be Unicode text, got the lone"):
            model.encode(texts)
    with pytest.raises(ValueError, match=r"inputs\[0\] must be Unicode text"):
        model.encode_query("a \udfff")


def test_a_batch_size_may_be_of_numpy(tmp_path):
    model = accelerate(splade(tmp_path))
    vectors = model.encode(TEXTS, batch_size=np.int32(2)).to_dense()
    assert torch.equal(vectors, model.encode(TEXTS, batch_size=2).to_dense())
