"""Checkpoints of adapters: loading, saving, and packages that do not work together."""

import json
import shutil
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from splade_fast.encoders.splade import SpladeEncoder
from tests.adapters import IS_PEFT_REFUSED, lora, with_adapters
from tests.tiny_models import masked_lm_configs, save_checkpoint

VERSIONS = f"peft {version('peft')} and transformers {version('transformers')} do not work together"


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path / "base")


@pytest.fixture
def adapters(base, tmp_path):
    """A folder of adapters, and the vectors that its model gives."""
    encoder = SpladeEncoder.from_pretrained(base)
    encoder = with_adapters(encoder, "get_peft_model", init_lora_weights=False).eval()
    encoder.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", vectors(encoder)


def vectors(encoder):
    with torch.no_grad():
        return encoder(**encoder.tokenize(["quick fox", "a lazy dog"]))


def test_loaded_adapters_are_saved_again(adapters, tmp_path):
    folder, expected = adapters
    SpladeEncoder.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    assert torch.equal(vectors(SpladeEncoder.from_pretrained(tmp_path / "again")), expected)


def test_a_model_with_adapters_loads_in_another_dtype(adapters):
    encoder = SpladeEncoder.from_pretrained(adapters[0], dtype=torch.bfloat16)
    assert any("lora_" in name for name, _ in encoder.named_parameters())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


def test_adapters_in_a_subfolder(adapters):
    folder, expected = adapters
    module = folder / "0_Transformer"
    module.mkdir()
    for file in [*folder.glob("adapter_*"), *folder.glob("tokenizer*"), *folder.glob("sentence_*")]:
        file.rename(module / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = module.name
    (folder / "modules.json").write_text(json.dumps(modules))
    assert torch.equal(vectors(SpladeEncoder.from_pretrained(folder)), expected)


def test_a_model_card_stays(adapters):
    folder, _ = adapters
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("What I trained.")
    SpladeEncoder.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "What I trained."


@pytest.mark.parametrize("name", [None, 3])
def test_adapters_of_no_checkpoint(adapters, name):
    file = adapters[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=f"in base_model_name_or_path, got {name}"):
        SpladeEncoder.from_pretrained(adapters[0])


def rename_base(folder, name):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


def test_a_relative_base_lies_in_the_working_directory_or_beside_the_adapters(
    adapters, tmp_path, monkeypatch
):
    folder, expected = adapters
    for name, place in {"base": tmp_path, "../base": tmp_path / "adapters" / "elsewhere"}.items():
        rename_base(folder, name)
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        assert torch.equal(vectors(SpladeEncoder.from_pretrained(folder)), expected)


def test_saved_adapters_name_an_absolute_base(adapters, tmp_path, monkeypatch):
    folder, expected = adapters
    monkeypatch.chdir(tmp_path)
    encoder = with_adapters(SpladeEncoder.from_pretrained("base"), "get_peft_model")
    encoder.save_pretrained("again")
    shutil.copy(folder / "adapter_model.safetensors", "again")
    monkeypatch.chdir(folder)
    assert torch.equal(vectors(SpladeEncoder.from_pretrained(tmp_path / "again")), expected)


def test_a_base_that_is_gone_is_named(adapters):
    rename_base(adapters[0], "../gone")
    with pytest.raises(
        FileNotFoundError, match=r"base_model_.*there is no model folder \.\./gone$"
    ):
        SpladeEncoder.from_pretrained(adapters[0])


def test_a_base_that_looks_like_a_hub_name_is_named(adapters, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rename_base(adapters[0], "gone/base")
    with pytest.raises(
        OSError, match="of .*adapters must name .* but gone/base is neither a folder"
    ):
        SpladeEncoder.from_pretrained(adapters[0])


def test_a_folder_may_hold_a_model_and_its_adapters(base, adapters, tmp_path):
    folder, expected = adapters
    shutil.copytree(base, folder, dirs_exist_ok=True)
    encoder = SpladeEncoder.from_pretrained(folder)
    assert torch.equal(vectors(encoder), expected)
    shutil.rmtree(base)
    encoder.save_pretrained(tmp_path / "again")  # adapters of the model in `folder`
    assert torch.equal(vectors(SpladeEncoder.from_pretrained(tmp_path / "again")), expected)


def test_a_head_that_is_missing_beside_adapters_is_named(base, adapters):
    folder, _ = adapters
    shutil.copytree(base, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "transform" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"predictions\.transform\.dense\.weight is missing"):
        SpladeEncoder.from_pretrained(folder)


def test_a_head_among_the_adapters_is_not_missing(base, tmp_path):
    """Adapters may hold whole modules, such as the transform of the head."""
    encoder = SpladeEncoder.from_pretrained(base)
    encoder = with_adapters(encoder, "get_peft_model", modules_to_save=["transform"]).eval()
    encoder.save_pretrained(tmp_path / "adapters")
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "transform" not in name}
    save_file(kept, base / "model.safetensors")
    again = SpladeEncoder.from_pretrained(tmp_path / "adapters")
    assert torch.equal(vectors(again), vectors(encoder))


@pytest.mark.parametrize("change", ["missing", "shape", "damaged", "gone"])
def test_adapters_without_their_weights(adapters, change):
    file = adapters[0] / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    if change == "missing":
        save_file({name: weight for name, weight in weights.items() if name != first}, file)
        message = "must fit the model: .*missing adapter keys"
    elif change == "shape":
        save_file(weights | {first: torch.zeros(3, 5)}, file)
        message = "must fit the model: .*\n.*size mismatch"
    elif change == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
        message = r"adapter_model\.safetensors is damaged: "
    else:
        file.unlink()
        message = "must hold adapter_model.safetensors or adapter_model.bin, got none"
    with pytest.raises((OSError, ValueError), match=message):
        SpladeEncoder.from_pretrained(adapters[0])


def test_virtual_tokens_are_no_adapters(adapters):
    file = adapters[0] / "adapter_config.json"
    config = json.loads(file.read_text())
    kept = {key: config[key] for key in ("base_model_name_or_path", "peft_version")}
    file.write_text(json.dumps(kept | {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    with pytest.raises(ValueError, match=r"peft_type of .* such as LORA, got .*PROMPT_TUNING"):
        SpladeEncoder.from_pretrained(adapters[0])


def test_peft_is_missing(adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="adapters need the package peft: pip install peft"):
        SpladeEncoder.from_pretrained(adapters[0])


def test_peft_misses_a_class_of_transformers(adapters, monkeypatch, tmp_path):
    (tmp_path / "peft.py").write_text("from transformers import ClassOfAnotherVersion")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(ImportError, match=rf"{VERSIONS} \(cannot import .*ClassOfAnotherVersion"):
        SpladeEncoder.from_pretrained(adapters[0])


def test_transformers_refuses_to_save_adapters(base, adapters, monkeypatch, tmp_path):
    folder, expected = adapters
    shutil.copytree(base, folder, dirs_exist_ok=True)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    encoder = SpladeEncoder(model, AutoTokenizer.from_pretrained(folder))
    torch.testing.assert_close(vectors(encoder), expected)
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "999.0")
    with pytest.raises(ImportError, match=rf"{VERSIONS} \(transformers asks for peft >= 999.0\)"):
        encoder.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_add_adapter_works_unless_transformers_refuses_peft(base):
    model = SpladeEncoder.from_pretrained(base).model
    if IS_PEFT_REFUSED:
        with pytest.raises(ValueError, match="version of PEFT .* is not compatible"):
            model.add_adapter(lora())
    else:
        model.add_adapter(lora())
        assert any("lora_" in name for name, _ in model.named_parameters())
