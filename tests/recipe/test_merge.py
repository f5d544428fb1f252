"""Merged checkpoints, compared with a plain computation on their files, and checks of models."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast.cli import app
from splade_fast.encoders.adapters import add_lora
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.settings import EncoderSettings
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.recipe import merge_checkpoints
from tests.tiny_models import make_model, make_tokenizer, masked_lm_configs


def change(encoder, seed):
    """Move all weights of an encoder, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return encoder


def make_encoder(dtype=torch.float32, tie=True, settings=None):
    config = masked_lm_configs()["bert"]
    config.num_hidden_layers, config.tie_word_embeddings = 1, tie
    return SpladeEncoder(make_model(config).to(dtype), make_tokenizer(), settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three folders of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        change(make_encoder(), seed).save_pretrained(folder / str(seed))
    return [folder / str(seed) for seed in range(3)]


def merge(models, path, **options):
    return merge_checkpoints(models, path, show_progress=False, **options)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_merged(path, models, combine):
    """Check the files of a merged model: each tensor is what `combine` makes of the models'."""
    own = [weights_of(model) for model in models]
    merged = weights_of(path)
    assert merged.keys() == own[0].keys()
    for name, tensor in merged.items():
        expected = combine(*(tensors[name].double() for tensors in own)).to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(tensor, own[0][name])


@pytest.mark.parametrize(("weights", "shares"), [(None, (1, 1, 1)), ([1, 0.5, 2.5], (1, 0.5, 2.5))])
def test_average(models, tmp_path, weights, shares):
    count = merge(models, tmp_path / "merged", weights=weights)
    total = sum(shares)
    assert_merged(
        tmp_path / "merged",
        models,
        lambda a, b, c: (shares[0] * a + shares[1] * b + shares[2] * c) / total,
    )
    assert count == len(dict(make_encoder().named_parameters()))


@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_slerp(models, tmp_path, weights):
    merge(models[:2], tmp_path / "merged", weights=weights, method="slerp")
    t = 0.5 if weights is None else 0.75

    def combine(a, b):
        angle = math.acos(float((a / a.norm()).flatten() @ (b / b.norm()).flatten()))
        return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)

    assert_merged(tmp_path / "merged", models[:2], combine)


def test_slerp_of_parallel_and_empty_tensors_is_linear(models, tmp_path):
    """A model and its double have no arc between them; neither have weights of 0."""
    encoder = SpladeEncoder.from_pretrained(models[0])
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(2)
    encoder.save_pretrained(tmp_path / "double")
    merge([models[0], tmp_path / "double"], tmp_path / "merged", weights=[3, 1], method="slerp")
    assert_merged(
        tmp_path / "merged", [models[0], tmp_path / "double"], lambda a, b: (3 * a + b) / 4
    )


def test_the_result_is_an_ordinary_folder(models, tmp_path):
    merge(models, tmp_path / "merged")
    encoder = SpladeEncoder.from_pretrained(tmp_path / "merged")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    decoder = model.get_output_embeddings().weight
    assert torch.equal(decoder, encoder.model.get_output_embeddings().weight)
    assert decoder is model.get_input_embeddings().weight  # tied, and merged once
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {
        p.name for p in models[0].iterdir()
    }


def test_half_precision_is_rounded_once(tmp_path):
    for seed in range(2):
        change(make_encoder(torch.bfloat16), seed).save_pretrained(tmp_path / str(seed))
    models = [tmp_path / "0", tmp_path / "1"]
    merge(models, tmp_path / "merged", weights=[1, 2])
    own, merged = [weights_of(model) for model in models], weights_of(tmp_path / "merged")
    for name, tensor in merged.items():
        exact = own[0][name].double() / 3 + own[1][name].double() * 2 / 3
        assert torch.equal(tensor, exact.to(torch.bfloat16)), name


def test_encoders_of_queries_are_merged_too(models, tmp_path):
    for seed in range(2):
        folder = tmp_path / str(seed)
        SpladeEncoder.from_pretrained(models[seed]).save_pretrained(folder)
        weight = torch.full((len(make_tokenizer()),), 1.0 + seed)
        BagOfWordsQueryEncoder(make_tokenizer(), weight).save_pretrained(folder / "query")
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", weights=[1, 3])
    assert_merged(tmp_path / "merged", models[:2], lambda a, b: (a + 3 * b) / 4)
    weight = weights_of(tmp_path / "merged" / "query")["weight"]
    assert torch.equal(weight, torch.full_like(weight, 1.75))
    with pytest.raises(ValueError, match=f"or none, got none in {models[0]}"):
        merge([tmp_path / "0", models[0]], tmp_path / "other")


def test_term_weights_are_merged(tmp_path):
    for seed in range(2):
        encoder = TermWeightEncoder(make_encoder().model.bert, make_tokenizer())
        change(encoder, seed).save_pretrained(tmp_path / str(seed))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    own = [TermWeightEncoder.from_pretrained(tmp_path / str(seed)) for seed in range(2)]
    merged = TermWeightEncoder.from_pretrained(tmp_path / "merged")
    expected = (own[0].projection.weight + own[1].projection.weight) / 2
    assert not torch.equal(own[0].projection.weight, own[1].projection.weight)
    torch.testing.assert_close(merged.projection.weight, expected)


def other_vocabulary():
    encoder = make_encoder()
    encoder.tokenizer.add_tokens(["cat"])
    encoder.model.resize_token_embeddings(len(encoder.tokenizer))
    return encoder


def swapped_words():
    encoder = make_encoder()
    state = encoder.tokenizer.backend_tokenizer.to_str()
    state = state.replace('"fox"', '"swap"').replace('"dog"', '"fox"').replace('"swap"', '"dog"')
    encoder.tokenizer.backend_tokenizer.__setstate__(state.encode())
    return encoder


OTHERS = {
    "class": (
        lambda: TermWeightEncoder(make_encoder().model.bert, make_tokenizer()),
        "must have the class of .*, SpladeEncoder, got TermWeightEncoder",
    ),
    "vocabulary": (other_vocabulary, "must have the vocab_size in config.json of .*, 20, got 21"),
    "words": (swapped_words, "must have the vocabulary of .*, got another tokenizer"),
    "dtype": (lambda: make_encoder(torch.bfloat16), "must have the dtype of .*float32, got .*bfl"),
    "ties": (lambda: make_encoder(tie=False), "must have the tie_word_embeddings in config.json"),
    "settings": (
        lambda: make_encoder(settings=EncoderSettings(pooling="sum")),
        "must have the settings of .*pooling='max'.*, got .*pooling='sum'",
    ),
    "layers": (
        lambda: SpladeEncoder(make_model(masked_lm_configs()["bert"]), make_tokenizer()),
        "must have the num_hidden_layers in config.json of .*, 1, got 2",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_differ_are_refused(models, tmp_path, name):
    make, message = OTHERS[name]
    make().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        merge([models[0], tmp_path / "other"], tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_adapters_are_refused(models, tmp_path):
    encoder = SpladeEncoder.from_pretrained(models[0])
    encoder.model = add_lora(encoder.model, rank=1, alpha=2, dropout=0.0)
    encoder.save_pretrained(tmp_path / "adapters")
    adapters = tmp_path / "adapters"
    with pytest.raises(ValueError, match="must have no adapters, .* merge_and_unload"):
        merge([adapters, adapters], tmp_path / "merged")


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "models must be at least two for average, got 1"),
        (3, {"method": "slerp"}, "models must be exactly two for slerp, got 3"),
        (2, {"method": "max"}, "method must be 'average' or 'slerp', got 'max'"),
        (2, {"weights": [1]}, "weights must be one per model, 2, got 1"),
        (2, {"weights": [1, -1]}, "weights must be finite, at least 0 and not all 0"),
    ],
)
def test_bad_arguments(models, tmp_path, count, options, message):
    with pytest.raises(ValueError, match=message):
        merge(models[:count], tmp_path / "merged", **options)


def test_the_command(models, tmp_path):
    out, expected = tmp_path / "out", tmp_path / "expected"
    arguments = ["merge", str(out), *map(str, models[:2]), "--weight", "1", "--weight", "3"]
    result = CliRunner().invoke(app, [*arguments, "--method", "slerp"])
    assert result.exit_code == 0, result.output
    count = merge(models[:2], expected, weights=[1, 3], method="slerp")
    assert result.stdout == f"{out}: {count} tensors of 2 models\n"
    assert weights_of(out).keys() == weights_of(expected).keys()
    assert all(torch.equal(weights_of(out)[n], t) for n, t in weights_of(expected).items())
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "must not exist yet" in again.stderr
    assert sf.SpladeEncoder.from_pretrained(out).vocab_size == 20
