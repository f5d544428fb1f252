"""Security: no code runs from pickles, corpora, model folders or configurations."""

import ast
import builtins
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import splade_fast
from splade_fast.cli import app
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.index import Index, IndexMeta
from splade_fast.training import load_training_data
from tests.adapters import WAYS, with_adapters
from tests.tiny_models import WORDS, masked_lm_configs, save_checkpoint
from tests.training.runs import CACHE, checkpoint_in, make_trainer, write_pairs

SOURCES = sorted(Path(splade_fast.__file__).parent.rglob("*.py"))


class Trap:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sprung(tmp_path):
    """Path of the folder that a trap makes; it must not exist after the test."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


@pytest.fixture
def model(tmp_path):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path / "model")


def trap(path, sprung):
    torch.save(Trap(sprung), path)
    assert b"mkdir" in path.read_bytes()


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    return result.output


def make_index(rows):
    return Index(rows, [str(i) for i in range(len(rows))], IndexMeta("model", 64, None))


def test_the_trap_works(tmp_path):
    path = tmp_path / "trap.bin"
    trap(path, tmp_path / "sprung too")
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung too").exists()


@pytest.mark.parametrize("kind", [SpladeEncoder, TermWeightEncoder])
def test_pickled_weights_of_a_model(model, sprung, kind):
    (model / "model.safetensors").unlink()
    trap(model / "pytorch_model.bin", sprung)
    with pytest.raises(ValueError, match=f"{model} .*pickle"):
        kind.from_pretrained(model)


def test_pickled_weights_of_the_command(model, sprung, tmp_path):
    (model / "model.safetensors").unlink()
    trap(model / "pytorch_model.bin", sprung)
    (tmp_path / "corpus.tsv").write_text("1\tquick fox\n")
    out = refused("encode", tmp_path / "corpus.tsv", tmp_path / "index", "--model", model)
    assert "pickle" in out


def test_plain_weights_in_a_pickle_are_read(model):
    weights = model / "model.safetensors"
    torch.save(load_file(weights), model / "pytorch_model.bin")
    expected = SpladeEncoder.from_pretrained(model).state_dict()
    weights.unlink()
    found = SpladeEncoder.from_pretrained(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickled_projection_of_term_weights(model, sprung):
    trap(model / "sparse_linear.pt", sprung)
    with pytest.raises(ValueError, match=f"{model}/sparse_linear.pt .*pickle"):
        TermWeightEncoder.from_pretrained(model)


@pytest.mark.parametrize("way", WAYS)
def test_pickled_adapters(model, sprung, way, tmp_path):
    encoder = with_adapters(SpladeEncoder.from_pretrained(model), way)
    encoder.save_pretrained(tmp_path / "adapters")
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    weights.unlink()
    trap(weights.with_suffix(".bin"), sprung)
    with pytest.raises((OSError, ValueError)):
        SpladeEncoder.from_pretrained(tmp_path / "adapters")


def test_pickles_beside_whole_files_are_not_looked_at(model, sprung, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "term_weights.pt", "heads.pt"):
        trap(model / name, sprung)
    vectors = SpladeEncoder.from_pretrained(model).encode(["quick fox"], show_progress=False)
    make_index(vectors).save(tmp_path / "index")
    trap(tmp_path / "index" / "vectors.pt", sprung)
    assert Index.load(tmp_path / "index").rows.equal(vectors)


def test_a_pickle_in_place_of_an_index(sprung, tmp_path):
    rows = SparseRows.from_dense(torch.eye(3))
    make_index(rows).save(tmp_path / "index")
    trap(tmp_path / "index" / "vectors.safetensors", sprung)
    with pytest.raises(ValueError, match="vectors.safetensors is not a safetensors file"):
        Index.load(tmp_path / "index")
    for name in ("ids.json", "meta.json"):
        make_index(rows).save(tmp_path / name)
        (tmp_path / name / name).write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            Index.load(tmp_path / name)


def test_pickles_in_a_checkpoint_of_a_training_run(sprung, tmp_path):
    start = checkpoint_in(tmp_path)
    data = load_training_data(write_pairs(tmp_path / "pairs.tsv", 25))
    output = tmp_path / "run"
    make_trainer(start, data, output, max_steps=2, save_steps=2, **CACHE).train()
    for name in (
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"),
        *("rng_state_0.pth", "training_args.bin", "pytorch_model.bin", "heads.pt"),
    ):
        trap(output / "checkpoint-2" / name, sprung)
    trainer = make_trainer(start, data, output, max_steps=4, save_steps=2, **CACHE)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


CODE = """
import os
os.mkdir({path!r})
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
class Config(BertConfig):
    model_type = "trap"
class Model(BertForMaskedLM):
    config_class = Config
class Tokenizer(BertTokenizerFast):
    pass
"""


@pytest.mark.parametrize("kind", [SpladeEncoder, TermWeightEncoder])
@pytest.mark.parametrize("model_type", ["trap", "bert"])
def test_code_of_a_model(model, sprung, monkeypatch, kind, model_type):
    """The user is never asked for permission, and the code never runs."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    (model / "code.py").write_text(CODE.format(path=str(sprung)))
    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoTokenizer")
    classes = ("code.Config", "code.Model", "code.Model", "code.Tokenizer")
    auto_map = dict(zip(names, classes, strict=True))
    edit_json(model / "config.json", model_type=model_type, auto_map=auto_map)
    edit_json(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
        tokenizer_class="Tokenizer",
    )
    if model_type == "trap":  # a type that transformers does not know
        with pytest.raises(ValueError, match="custom code"):
            kind.from_pretrained(model)
    else:
        assert type(kind.from_pretrained(model).model).__module__.startswith("transformers.models")
    assert questions == []


def test_modules_of_a_sparse_encoder(model, sprung, monkeypatch):
    """Class names in modules.json are never imported."""
    SpladeEncoder.from_pretrained(model).save_pretrained(model)
    (model / "trapped.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    monkeypatch.syspath_prepend(str(model))
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["type"] = "trapped.MLMTransformer"
    (model / "modules.json").write_text(json.dumps(modules))
    assert SpladeEncoder.from_pretrained(model).settings.pooling == "max"


def test_objects_in_a_configuration(sprung, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{sprung}']\n")
    assert "config.yaml must be a YAML file" in refused("train", "--config", config)


def test_names_and_texts_are_never_commands(model, sprung, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "$(mkdir sprung)`mkdir sprung`;mkdir sprung|mkdir sprung\n'\"{{__import__('os')}}"
    corpus = tmp_path / f"{name}.jsonl"
    ids = [f"{i}{name}".replace("\n", " ") for i in range(3)]
    lines = [json.dumps({"_id": doc_id, "text": f"{name} quick fox"}) for doc_id in ids]
    corpus.write_text("\n".join(lines))
    result = invoke("encode", corpus, tmp_path / f"{name} index", "--model", model)
    assert result.exit_code == 0, result.output
    assert Index.load(tmp_path / f"{name} index").ids == ids
    pairs = tmp_path / f"{name}.tsv"
    pairs.write_text("".join(f"{word}\t__import__('os').mkdir('sprung')\n" for word in WORDS))
    assert len(list(load_training_data(pairs))) == len(WORDS)


FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"),
    *("marshal.load", "marshal.loads", "shelve.open"),
}
# Ray's own messages are pickles: what its processes send each other is as trusted as they are.
TRUSTED_CALLS = {"ray_engine.py": {"pickle.loads", "torch.load"}}
FORBIDDEN_OPTIONS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_call_executes_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in TRUSTED_CALLS.get(path.name, ()):
                continue
            options = {(o.arg, getattr(o.value, "value", None)) for o in node.keywords}
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno}"
            assert not options & FORBIDDEN_OPTIONS, f"line {node.lineno}"
            if name == "torch.load":
                assert ("weights_only", True) in options, f"line {node.lineno}"
