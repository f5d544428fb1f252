"""`splade-fast train`: configuration, output, and errors of bad input."""

import json
import resource
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from splade_fast.cli import app
from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder
from splade_fast.training import RetrievalEvaluator
from splade_fast.training.checkpoints.folders import find_checkpoints
from splade_fast.training.configuration import parse_configuration
from tests.integrations.sparse_encoders import inference_free
from tests.search.beir import write_beir
from tests.tiny_models import causal_lm_configs, save_checkpoint
from tests.training.runs import checkpoint_in, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path, model):
    """A folder with data, and a configuration that trains on it for two steps."""
    write_pairs(tmp_path / "pairs.tsv", 12)
    (tmp_path / "corpus.tsv").write_text("d1\tquick brown fox\nd2\tlazy dog\nd3\told tree\n")
    (tmp_path / "queries.tsv").write_text("q1\tfox\nq2\ttree\n")
    (tmp_path / "qrels.tsv").write_text("q1 d1 1\nq2 d3 1\n")
    configure(
        tmp_path,
        model_name_or_path=str(model),
        train_data=[str(tmp_path / "pairs.tsv")],
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate="1e-3",  # YAML reads it as a string
        logging_steps=1,
    )
    return tmp_path


def configure(folder, **changes):
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text()) if path.exists() else {}
    values = {k: v for k, v in (values | changes).items() if v is not ...}
    path.write_text(yaml.safe_dump(values))


def invoke(files, *flags):
    arguments = ["train", "--config", files / "config.yaml", *flags]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def trained(files, *flags):
    result = invoke(files, *flags)
    assert result.exit_code == 0, result.output
    return result


def refused(files, *flags):
    """Return the error of a run, which is its only message."""
    result = invoke(files, *flags)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1
    return " ".join(result.stderr.partition("Error: ")[2].split())


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_trains_as_the_file_says(files, model):
    result = trained(files)
    assert f"{files / 'run'}: trained for 2 steps" in result.stdout
    entries = [entry for entry in log_of(files / "run") if "loss" in entry]
    assert [entry["learning_rate"] for entry in entries] == [1e-3, 5e-4]
    encoder = SpladeEncoder.from_pretrained(files / "run")
    before = SpladeEncoder.from_pretrained(model)
    assert not all(
        torch.equal(a, b) for a, b in zip(encoder.parameters(), before.parameters(), strict=True)
    )
    assert AutoModelForMaskedLM.from_pretrained(files / "run")
    assert [path.name for path in find_checkpoints(files / "run")] == ["checkpoint-2"]
    assert list((files / "run").rglob("events.out.tfevents*"))


def test_flags_override_the_file_which_may_hold_lists_and_mappings(files):
    more = write_pairs(files / "more.tsv", 4, seed=1)
    configure(
        files,
        **{"train-data": [str(files / "pairs.tsv"), str(more)], "train_data": ...},
        num_train_epochs=3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        bf16=True,
    )
    flags = ["--max-steps=-1", "--num_train_epochs", 1, "--learning_rate=0.002"]
    trained(files, *flags, "--report_to", "none")
    state = json.loads((files / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 4  # 16 examples
    assert len([entry for entry in log_of(files / "run") if "loss" in entry]) == 4
    assert log_of(files / "run")[0]["learning_rate"] == 0.002
    assert not list((files / "run").rglob("events.out.tfevents*"))


def test_a_run_goes_on_or_starts_anew(files):
    trained(files, "--save_steps", 1)
    assert f"output_dir must be empty, got {files / 'run'}; --resume goes on" in refused(files)
    trained(files, "--resume", "--max_steps", 4)
    steps = [entry["step"] for entry in log_of(files / "run") if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    trained(files, "--overwrite_output_dir", "--max_steps", 1)
    assert [path.name for path in find_checkpoints(files / "run")] == ["checkpoint-1"]
    trained(
        files,
        *("--resume_from_checkpoint", files / "run" / "checkpoint-1"),
        *("--output_dir", files / "other", "--max_steps", 2),
    )
    assert [path.name for path in find_checkpoints(files / "other")] == ["checkpoint-2"]


def test_resuming_without_a_checkpoint_starts(files):
    (files / "run").mkdir()
    (files / "run" / "log.txt").write_text("of a run that was killed before its first checkpoint")
    trained(files, "--resume")


def test_evaluates_loss_and_retrieval(files):
    configure(
        files,
        eval_data=str(files / "pairs.tsv"),
        eval_queries=str(files / "queries.tsv"),
        eval_corpus=str(files / "corpus.tsv"),
        eval_qrels=str(files / "qrels.tsv"),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="MRR@10",
        greater_is_better=True,
    )
    trained(files)
    found = [entry for entry in log_of(files / "run") if "eval_loss" in entry]
    assert len(found) == 2
    assert all({"eval_MRR@10", "eval_relevance_loss", "eval_index_mib"} <= e.keys() for e in found)


@pytest.mark.parametrize(("flag", "recall"), [([], 1.0), (["--eval_ignore_identical_ids"], 0.0)])
def test_evaluates_without_the_document_of_the_query_on_request(files, flag, recall):
    """Each query is a document and judged to be its own answer."""
    (files / "qrels.tsv").write_text("d1 d1 1\nd2 d2 1\n")
    configure(
        files,
        eval_queries=str(files / "corpus.tsv"),
        eval_corpus=str(files / "corpus.tsv"),
        eval_qrels=str(files / "qrels.tsv"),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
    )
    trained(files, *flag)
    [entry] = [entry for entry in log_of(files / "run") if "eval_Recall@100" in entry]
    assert entry["eval_Recall@100"] == recall


@pytest.mark.parametrize("kind", ["idf", "learned"])
def test_bags_of_words_as_queries(files, kind):
    trained(files, "--query_encoder", "bag_of_words", "--query_weights", kind)
    queries = BagOfWordsQueryEncoder.from_pretrained(files / "run" / "query")
    assert queries.weight.requires_grad == (kind == "learned")
    documents = [line.split("\t")[1] for line in (files / "pairs.tsv").read_text().splitlines()]
    idf = BagOfWordsQueryEncoder.from_texts(documents, queries.tokenizer, queries.vocab_size)
    assert torch.equal(queries.weight, idf.weight) == (kind == "idf")
    trained(files, "--query_encoder", files / "run" / "query", "--output_dir", files / "again")


def test_searches_encode_queries_as_training_did(files):
    trained(files, "--query_encoder", "bag_of_words")
    run, index, corpus = files / "run", files / "index", files / "corpus.tsv"
    for command in (["encode", corpus, index, "--model", run], ["search", index, "old fox"]):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
    queries = BagOfWordsQueryEncoder.from_pretrained(run / "query")
    texts = [line.split("\t")[1] for line in corpus.read_text().splitlines()]
    documents = SpladeEncoder.from_pretrained(run).encode(texts, show_progress=False)
    [scores] = (queries.encode("old fox").to_dense() @ documents.to_dense().T).tolist()
    found = [line.split("\t") for line in result.stdout.splitlines()]
    expected = {f"d{place}": score for place, score in enumerate(scores, start=1) if score > 0}
    assert {line[2]: float(line[3]) for line in found} == pytest.approx(expected, abs=1e-5)
    trained(files, "--overwrite_output_dir")  # with one encoder
    assert not (run / "query").exists()


def test_another_encoder_for_queries(files, model):
    trained(files, "--query_encoder", model)
    queries = SpladeEncoder.from_pretrained(files / "run" / "query")
    documents = SpladeEncoder.from_pretrained(files / "run")
    same = [
        torch.equal(a, b) for a, b in zip(queries.parameters(), documents.parameters(), strict=True)
    ]
    assert not all(same)


def test_a_router_gives_its_query_encoder(files):
    inference_free(files).save_pretrained(str(files / "routed"))
    expected = BagOfWordsQueryEncoder.from_pretrained(files / "routed").weight
    flags = ["--model_name_or_path", files / "routed", "--query_encoder", files / "routed"]
    trained(files, *flags, "--learning_rate", "1e-6")
    queries = BagOfWordsQueryEncoder.from_pretrained(files / "run" / "query")
    torch.testing.assert_close(queries.weight, expected, rtol=0, atol=1e-5)


def test_adapters(files, model):
    trained(files, "--lora_rank", 2, "--lora_dropout", 0.1)
    assert (files / "run" / "adapter_model.safetensors").is_file()
    encoder = SpladeEncoder.from_pretrained(files / "run")
    assert any("lora_" in name for name, _ in encoder.named_parameters())
    trained(files, "--lora_rank", 2, "--lora_dropout", 0.1, "--resume", "--max_steps", 3)


def test_adapters_are_added_once(files):
    trained(files, "--lora_rank", 2)
    again = ["--model_name_or_path", files / "run", "--output_dir", files / "again"]
    message = "lora_rank must be 0 for a checkpoint that has adapters, got 2"
    assert message in refused(files, "--lora_rank", 2, *again)


def test_decoder_models_train_with_their_settings(files):
    base = save_checkpoint(causal_lm_configs()["llama"], files / "llama")
    settings = {"attention": "bidirectional", "pooling": "mean", "echo": " again "}
    configure(
        files,
        model_name_or_path=str(base),
        **settings,
        logit_scale=0.25,
        train_logit_scale=True,
        prompts=["query=the old "],
        loss="negative_cache",
        cache_size=8,
        cache_document_length=32,
        save_steps=1,
    )
    trained(files)
    expected = SpladeEncoder.from_pretrained(files / "run")
    found = {name: getattr(expected.settings, name) for name in settings}
    assert (found, expected.settings.prompts) == (settings, {"query": "the old "})
    assert 0 < abs(expected.settings.logit_scale - 0.25) < 0.01
    shutil.rmtree(files / "run" / "checkpoint-2")
    trained(files, "--resume")
    resumed = SpladeEncoder.from_pretrained(files / "run")
    for a, b in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_term_weights_from_a_stream(files):
    flags = ["--streaming", "--max_steps", 5, "--shuffle_buffer", 4]
    trained(files, "--architecture", "term_weights", *flags)
    assert TermWeightEncoder.from_pretrained(files / "run")
    assert len([entry for entry in log_of(files / "run") if "loss" in entry]) == 5


def test_negative_cache_and_evaluation_at_the_end_without_a_strategy(files):
    configure(files, loss="negative_cache", cache_size=8, cache_k=8, cache_document_length=16)
    trained(files, "--eval_data", files / "pairs.tsv")
    assert "cache/staleness" in log_of(files / "run")[0]
    assert [entry["step"] for entry in log_of(files / "run") if "eval_loss" in entry] == [2]


def test_a_file_means_what_it_says(files):
    """YAML 1.1 reads no, on and off as booleans, 1.10 as a number and 1e-4 as a string."""
    with (files / "config.yaml").open("a") as file:
        file.write(
            "save_strategy: no\nlogging_strategy: no\nrun_name: 1.10\ntrain_split: on\n"
            "adam_epsilon: 1e-7\nstreaming: off\ncolumns: [no, 010]\neval_delay: 0x10\n"
            "lr_scheduler_kwargs: {min_lr: 1.0e-5}\nbf16: no\n"
        )
    found = parse_configuration(["--config", str(files / "config.yaml")])
    training, data = found.training, found.data
    assert (training.save_strategy, training.logging_strategy) == ("no", "no")
    assert (training.run_name, data.train_split, data.columns) == ("1.10", "on", ["no", "010"])
    assert (training.adam_epsilon, training.learning_rate) == (1e-7, 1e-3)
    assert (data.streaming, training.bf16, training.eval_delay) == (False, False, 16)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_keys_are_given_once(files):
    with (files / "config.yaml").open("a") as file:
        file.write("loss: in_batch\nloss: kl\n")
    assert "config.yaml must hold each key once, got 'loss' twice" in refused(files)


def test_paths_may_start_at_home(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    names = ("model_name_or_path", "query_encoder", "train_queries", "eval_queries")
    configure(files, **dict.fromkeys([*names, "eval_corpus", "eval_qrels"], "~/x"))
    configure(files, train_data=["~/x"], eval_data=["~/x"], resume_from_checkpoint="~/x")
    (files / "config.yaml").write_text((files / "config.yaml").read_text(), encoding="utf-8-sig")
    found = parse_configuration(["--config", "~/config.yaml"])
    assert {getattr(found.model, name) for name in names[:2]} == {str(files / "x")}
    assert {getattr(found.data, name) for name in names[2:]} == {str(files / "x")}
    assert found.data.train_data == found.data.eval_data == [str(files / "x")]
    assert found.training.resume_from_checkpoint == str(files / "x")


def test_words_that_an_option_does_not_have_are_named_as_written(files):
    with (files / "config.yaml").open("a") as file:
        file.write("eval_strategy: off\n")
    assert "--eval_strategy/--eval-strategy: invalid choice: 'off'" in refused(files)


def test_help_is_readable(files):
    help_text = CliRunner().invoke(app, ["train", "--help"]).stdout
    everything = CliRunner().invoke(app, ["train", "--help-all"]).stdout
    for flag in ("--model_name_or_path", "--train_data", "--loss", "--max_steps", "--resume"):
        assert f"\n  {flag}\n" in help_text
    assert "--torch_compile_backend" not in help_text
    assert "\n  --torch_compile_backend\n" in everything
    assert all(len(line) <= 100 for line in help_text.splitlines())
    assert "train" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"learnin_rate": 1},
            [],
            "config.yaml: unknown key 'learnin_rate'; near it: learning_rate",
        ),
        ({"zzz": 1}, [], "config.yaml: unknown key 'zzz'"),
        ({}, ["--losss", "kl"], "unknown flag --losss; near it: --loss"),
        ({}, ["--max-step=3"], "unknown flag --max-step; near it: --max_steps"),
        ({}, ["extra"], "expected a flag, got 'extra'"),
        ({}, ["--max_steps", "many"], "--max_steps/--max-steps: invalid int value: 'many'"),
        ({"bf16": "perhaps"}, [], "perhaps"),
        ({"max_steps": None}, [], "max_steps must have a value; leave it out for the default"),
        ({"loss": "bm25"}, [], "bm25"),
        ({"loss": "negative_cache"}, [], "cache_size must be at least 1"),
        ({"architecture": "colbert"}, [], "colbert"),
        ({"lora_rank": 2, "architecture": "term_weights"}, [], "lora_rank must be 0"),
        ({"echo": " ", "architecture": "term_weights"}, [], "echo must be left out for"),
        ({"attention": "both"}, [], "both"),
        (
            {"attention": "causal"},
            [],
            "attention must be 'bidirectional', the only one of BertForMaskedLM",
        ),
        ({"prompts": "query"}, [], "prompts must be name=text, got 'query'"),
        ({"logit_scale": 0}, [], "logit_scale must be greater than 0, got 0.0"),
        ({"model_name_or_path": ...}, [], "required: --model_name_or_path"),
        ({"model_name_or_path": "./no-such-folder"}, [], "no-such-folder"),
        ({"query_encoder": "./no-such-folder"}, [], "no-such-folder"),
        ({"train_data": "no-such-file.tsv"}, [], "no such file: no-such-file.tsv"),
        ({"streaming": True, "max_steps": ...}, [], "max_steps must be given with streaming"),
        ({"eval_queries": "q.tsv"}, [], "must be given together, got no eval_corpus, eval_qrels"),
        ({"eval_strategy": "steps"}, [], "eval_strategy must be 'no' without eval_data"),
        ({"loss": "kl"}, [], "documents must be at least 2 for each query for kl, got 1"),
        ({"fsdp": True}, [], "fsdp must be off without torchrun or accelerate launch"),
        ({"deepspeed": "ds.json"}, [], "fsdp: true shards the weights (FSDP2)"),
        ({"resume_from_checkpoint": "no/checkpoint-1"}, [], "no/checkpoint-1: no such folder"),
        ({"num_train_epochs": "x"}, [], "invalid float value: 'x'"),
        ({"learning_rate": 0}, [], "learning_rate must be greater than 0, got 0.0"),
        ({"learning_rate": float("inf")}, [], "learning_rate must be finite, got inf"),
        ({"weight_decay": float("nan")}, [], "weight_decay must be finite, got nan"),
        (
            {"per_device_train_batch_size": 0},
            [],
            "per_device_train_batch_size must be at least 1, got 0",
        ),
        (
            {"gradient_accumulation_steps": 0},
            [],
            "gradient_accumulation_steps must be at least 1, got 0",
        ),
        (
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
            [],
            "lr_scheduler_kwargs must fit lr_scheduler_type, linear, got {'num_cycles': 2}",
        ),
        ({"lora_rank": 2, "lora_alpha": -4}, [], "lora_alpha must be greater than 0, got -4"),
        ({"query_encoder": ""}, [], "query_encoder must be a folder or a hub name, got ''"),
        ({"lambda_query": [1, 2]}, [], "config.yaml: lambda_query must be one value, got [1, 2]"),
        ({"max_steps": 0}, [], "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        (
            {"max_steps": ..., "num_train_epochs": 0},
            [],
            "num_train_epochs must be greater than 0, got 0.0",
        ),
        (
            {"per_device_train_batch_size": 1},
            [],
            "per_device_train_batch_size must be at least 2 for in_batch with pairs",
        ),
        (
            {"per_device_train_batch_size": 13, "dataloader_drop_last": True},
            [],
            "dataloader_drop_last must be False for 12 examples, fewer than a batch of 13",
        ),
    ],
)
def test_bad_configurations(files, monkeypatch, changes, flags, message):
    monkeypatch.chdir(files)
    configure(files, **changes)
    assert message in refused(files, *flags)
    assert not list(files.glob("run/*checkpoint*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"one": "a", "two": "b"}\n', "expected the columns query, document"),
        ("bad.tsv", "fox\tquick brown fox\n\ttree\n", "bad.tsv, line 2: "),
        ("bad.tsv", "fox\tquick brown fox\t0.5\ndog\tlazy dog\t1.5\n", "bad.tsv, line 2: "),
        ("bad.tsv", "", "must hold at least one"),
    ],
    ids=["columns", "empty text", "label", "empty file"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_data(files, name, content, message, streaming):
    (files / name).write_text(content)
    configure(files, train_data=str(files / name), streaming=streaming)
    if "0.5" in content:
        configure(files, loss="pointwise")
    assert message in refused(files)
    assert not list(files.glob("run/*checkpoint*"))


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", "\xff", None])
def test_bad_files(files, content):
    path = files / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert "config.yaml" in refused(files)


def test_the_output_is_a_file(files):
    (files / "run").write_text("")
    assert "output_dir must be a folder" in refused(files)


def test_damaged_checkpoints(files):
    trained(files)
    file = files / "run" / "checkpoint-2" / "optimizer.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    message = refused(files, "--resume", "--max_steps", 4)
    assert f"cannot read {file}" in message
    file.unlink()
    message = refused(files, f"--resume_from_checkpoint={file.parent}", "--max_steps=4")
    assert f"{file.parent}: optimizer.safetensors is missing" in message


def test_a_full_disk(files):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trained(files, "--max_steps", 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        message = refused(files, "--resume", "--max_steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {files / 'run' / 'checkpoint-2'}" in message
    assert "File too large" in message
    assert [path.name for path in find_checkpoints(files / "run")] == ["checkpoint-1"]
    assert not list((files / "run").glob(".*"))


def test_sets_of_the_evaluation_and_other_measures(files):
    for name, qrels in (("first", {"q1": {"d1": 1}}), ("second", {"q2": {"d3": 1}})):
        write_beir(files / name, qrels=qrels)
    sets = [str(files / "first"), str(files / "second")]
    configure(files, eval_sets=sets, eval_measures=["P@1", "AP"])
    trained(files)
    [metrics] = [entry for entry in log_of(files / "run") if "eval_AP" in entry]
    encoder = SpladeEncoder.from_pretrained(files / "run")
    for measure in ("P@1", "AP"):
        values = [
            RetrievalEvaluator.from_data(folder, measures=[measure])(encoder)[measure]
            for folder in sets
        ]
        assert metrics[f"eval_{measure}"] == pytest.approx(sum(values) / 2)
        assert metrics[f"eval_second/{measure}"] == pytest.approx(values[1])
    message = refused(files, "--eval_queries", "q", "--output_dir", str(files / "other"))
    assert "eval_sets must be given without eval_queries, eval_corpus, eval_qrels" in message
