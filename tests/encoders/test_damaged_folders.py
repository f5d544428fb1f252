"""Model folders that are incomplete, damaged, gone, or of another encoder: one clear error."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from splade_fast.cli import app
from splade_fast.encoders import pretrained
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.query_encoder import load_query_encoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from tests.tiny_models import (
    causal_lm_configs,
    make_model,
    make_tokenizer,
    masked_lm_configs,
    save_checkpoint,
)

CONFIGS = {**masked_lm_configs(), **causal_lm_configs()}
HEADS = {
    "bert": "cls.predictions.transform.dense.weight",
    "distilbert": "vocab_transform.weight",
    "modernbert": "head.dense.weight",
    "llama": "lm_head.weight",
}


@pytest.fixture
def bert(tmp_path):
    return save_checkpoint(CONFIGS["bert"], tmp_path / "bert")


@pytest.fixture
def encode(tmp_path):
    """Function that encodes a corpus by the command line and returns its error."""

    def run(model):
        (tmp_path / "corpus.tsv").write_text("1\tquick fox\n")
        arguments = ["encode", tmp_path / "corpus.tsv", tmp_path / "index", "--model", model]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, (result.output, result.exception)
        assert not (tmp_path / "index").exists()
        return result.output[result.output.index("Error: ") :]  # behind the progress of loading

    return run


def cut(file, length=None):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if length is None else length])


def save_base(family, folder):
    make_model(CONFIGS[family]).base_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_is_missing_is_named(family, tmp_path, encode):
    folder = save_base(family, tmp_path / "base")
    with pytest.raises(ValueError, match=rf"must hold all weights .* {HEADS[family]} is missing"):
        SpladeEncoder.from_pretrained(folder)
    assert f"{HEADS[family]} is missing" in encode(folder)


def test_a_tied_head_is_not_missing(tmp_path):
    folder = save_base("qwen2", tmp_path / "base")
    expected = make_model(CONFIGS["qwen2"]).get_input_embeddings().weight
    found = SpladeEncoder.from_pretrained(folder).model.get_output_embeddings().weight
    assert torch.equal(found, expected)


def test_one_missing_weight_is_named(bert):
    weights = load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    save_file({k: v for k, v in weights.items() if k != name}, bert / "model.safetensors")
    for kind in (SpladeEncoder, TermWeightEncoder):
        with pytest.raises(ValueError, match=rf"{name.removeprefix('bert.')} is missing$"):
            kind.from_pretrained(bert)


def test_weights_of_other_shapes_are_named(bert, encode):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    message = "intermediate.dense.bias is (24,) instead of (32,)"
    assert message in encode(bert)
    with pytest.raises(ValueError, match="must hold all weights") as error:
        TermWeightEncoder.from_pretrained(bert)
    assert message in str(error.value)


def test_term_weights_of_a_plain_encoder_get_a_new_projection(tmp_path):
    encoder = TermWeightEncoder.from_pretrained(save_base("bert", tmp_path / "base"))
    assert torch.equal(encoder.projection.bias, torch.ones(1))


@pytest.mark.parametrize("family", ["bert", "qwen2"])  # the head of Qwen 2 is tied
def test_another_encoders_folder_names_its_class(family, tmp_path, encode):
    checkpoint = save_checkpoint(CONFIGS[family], tmp_path / "checkpoint")
    folder = tmp_path / "weights"
    TermWeightEncoder.from_pretrained(checkpoint).save_pretrained(folder)
    with pytest.raises(ValueError, match="got weights of terms; TermWeightEncoder loads them"):
        SpladeEncoder.from_pretrained(folder)
    BagOfWordsQueryEncoder(make_tokenizer()).save_pretrained(tmp_path / "bag")
    assert "got SparseStaticEmbedding; BagOfWordsQueryEncoder loads it" in encode(tmp_path / "bag")
    with pytest.raises(ValueError, match="got SparseStaticEmbedding; BagOfWordsQueryEncoder loads"):
        TermWeightEncoder.from_pretrained(tmp_path / "bag")
    with pytest.raises(ValueError, match="got nothing; SpladeEncoder loads"):
        BagOfWordsQueryEncoder.from_pretrained(checkpoint)


@pytest.mark.parametrize("kind", [SpladeEncoder, TermWeightEncoder, BagOfWordsQueryEncoder])
def test_a_folder_without_a_tokenizer(kind, bert, tmp_path):
    folder = bert
    if kind is BagOfWordsQueryEncoder:
        folder = tmp_path / "bag"
        kind(make_tokenizer()).save_pretrained(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(OSError, match=f"^{folder} must hold a tokenizer, .* got none$"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["./gone", "a/model/gone", "{}/gone", "~/gone"])
def test_a_folder_that_is_gone(name, tmp_path, encode):
    name = name.format(tmp_path)
    for kind in (SpladeEncoder, TermWeightEncoder, BagOfWordsQueryEncoder):
        with pytest.raises(FileNotFoundError, match=f"^there is no model folder {name}$"):
            kind.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="^there is no model folder"):
        load_query_encoder(name)
    assert encode(name) == f"Error: there is no model folder {name}\n"


def test_a_file_is_no_folder(bert):
    with pytest.raises(NotADirectoryError, match="got the file .*config.json"):
        SpladeEncoder.from_pretrained(bert / "config.json")


@pytest.mark.parametrize("length", [0, 4, None])
@pytest.mark.parametrize("kind", [SpladeEncoder, TermWeightEncoder])
def test_weights_that_end_early(kind, length, bert):
    cut(bert / "model.safetensors", length)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
        kind.from_pretrained(bert)


def test_the_command_names_damaged_weights(bert, encode):
    cut(bert / "model.safetensors")
    assert encode(bert).startswith(f"Error: {bert / 'model.safetensors'} is damaged: ")


@pytest.mark.parametrize("length", [0, None])
def test_pickled_weights_that_end_early(length, bert):
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    cut(bert / "pytorch_model.bin", length)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged: "):
        SpladeEncoder.from_pretrained(bert)


@pytest.mark.parametrize("pattern", ["model-00002-of-*.safetensors", "*.index.json"])
def test_shards_that_end_early(pattern, tmp_path):
    make_model(CONFIGS["bert"]).save_pretrained(tmp_path, max_shard_size="5KB")
    make_tokenizer().save_pretrained(tmp_path)
    [file] = tmp_path.glob(pattern)
    cut(file)
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        SpladeEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config_sentence_transformers.json", [], "must be a JSON object, got"),
        ("config_sentence_transformers.json", {"prompts": []}, None),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "must be texts by name, got"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "must be texts by name, got"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "must be a whole number or null"),
        ("sentence_bert_config.json", "x", "must be a JSON object, got 'x'"),
        ("1_SpladePooling/config.json", [1], "must be a JSON object, got"),
        ("1_SpladePooling/config.json", {"activation_function": []}, "must be one of relu, log1p"),
    ],
)
def test_settings_of_other_content(file, content, message, bert, tmp_path):
    SpladeEncoder.from_pretrained(bert).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / file).write_text(json.dumps(content))
    if message is None:
        assert SpladeEncoder.from_pretrained(tmp_path / "saved").settings.prompts == {}
        return
    with pytest.raises(ValueError, match=message):
        SpladeEncoder.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("length", [0, None])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_ends_early(file, length, bert, encode):
    cut(bert / file, length)
    assert file in encode(bert)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"model_type": "bert", "hidden_size": "x"}, "config.json of .* a model: "),
        ("tokenizer.json", {}, "the tokenizer of .* cannot be read: "),
        ("tokenizer_config.json", [], "the tokenizer of .* cannot be read: "),
    ],
)
def test_json_of_other_content(file, content, message, bert):
    (bert / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SpladeEncoder.from_pretrained(bert)


def test_other_files_of_weights_that_end_early(bert, tmp_path):
    TermWeightEncoder.from_pretrained(bert).save_pretrained(tmp_path / "weights")
    cut(tmp_path / "weights" / "term_weights.safetensors")
    with pytest.raises(ValueError, match=r"term_weights\.safetensors is damaged: "):
        TermWeightEncoder.from_pretrained(tmp_path / "weights")
    BagOfWordsQueryEncoder(make_tokenizer()).save_pretrained(tmp_path / "bag")
    cut(tmp_path / "bag" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
        BagOfWordsQueryEncoder.from_pretrained(tmp_path / "bag")
    shutil.copytree(bert, tmp_path / "bge")
    torch.save({"weight": torch.ones(1, 16)}, tmp_path / "bge" / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear\.pt must hold weight \(1, 16\) and bias"):
        TermWeightEncoder.from_pretrained(tmp_path / "bge")
    cut(tmp_path / "bge" / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear\.pt is damaged: "):
        TermWeightEncoder.from_pretrained(tmp_path / "bge")


def test_a_name_without_a_network_is_looked_up_in_the_cache_alone(monkeypatch):
    """huggingface_hub would try five times to find each file, in half a minute."""

    def no_address(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(pretrained, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", pytest.fail)
    pretrained._is_hub_reachable.cache_clear()
    try:
        for load in (SpladeEncoder.from_pretrained, load_query_encoder):
            with pytest.raises(OSError, match="gone/model|cached files"):
                load("gone/model")
    finally:
        pretrained._is_hub_reachable.cache_clear()


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    folder = save_checkpoint(CONFIGS["llama"], tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="must have a padding token or an end-of-sequence token"):
        SpladeEncoder.from_pretrained(folder)


@pytest.mark.parametrize("kind", [SpladeEncoder, TermWeightEncoder])
def test_a_subfolder_is_not_ignored(kind, tmp_path):
    folder = save_checkpoint(CONFIGS["bert"], tmp_path / "model")
    with pytest.raises(ValueError, match="subfolder must be left out, got 'other'"):
        kind.from_pretrained(folder, subfolder="other")


def test_a_default_prompt_that_is_missing_is_named(tmp_path):
    folder = save_checkpoint(CONFIGS["bert"], tmp_path / "model")
    SpladeEncoder.from_pretrained(folder).save_pretrained(folder)
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"default_prompt_name": "no"}))
    with pytest.raises(
        ValueError, match=r"default_prompt_name in config_s.* one of \[\], got 'no'"
    ):
        SpladeEncoder.from_pretrained(folder)


def test_settings_of_other_types_are_named(tmp_path):
    folder = save_checkpoint(CONFIGS["bert"], tmp_path / "model")
    TermWeightEncoder.from_pretrained(folder).save_pretrained(folder)
    (folder / "term_weights.json").write_text('{"max_length": "12"}')
    with pytest.raises(ValueError, match=r"term_weights\.json .* max_length must be an integer"):
        TermWeightEncoder.from_pretrained(folder)
