"""Every command of docs/recipe.md runs in its order, on tiny data and models."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from splade_fast.cli import app
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.search.index import Index
from splade_fast.search.significance import read_per_query
from splade_fast.training import load_training_data
from tests.recipe.corpora import draw_task
from tests.search.beir import write_beir, write_lines
from tests.tiny_models import make_tokenizer, masked_lm_configs, save_checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
BLOCK = re.compile(r"^```(yaml|sh)\n(.*?)^```$", flags=re.S | re.M)
# Sizes for tiny data: numbers of steps, and of what a batch, a cache and a list hold.
SMALLER = {
    r"(cache_size|per_device_train_batch_size): \d+": r"\1: 4",
    r"(max_steps|regularizer_steps): \d+": r"\1: 2",
    r"(save_steps|eval_steps): \d+": r"\1: 1",
    r"checkpoint-4000": "checkpoint-1",
    r"checkpoint-5000": "checkpoint-2",
    r"--num-negatives \d+": "--num-negatives 2",
}


def write_models(folder):
    """Write what the names of the page stand for; return {name on the hub: folder}."""
    config = masked_lm_configs()["bert"]
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    return {
        "distilbert-base-uncased": save_checkpoint(masked_lm_configs()["bert"], folder / "bert"),
        "cross-encoder/ms-marco-MiniLM-L6-v2": folder / "teacher",
        "zeta-alpha-ai/NanoSciFact": write_beir(folder / "NanoSciFact"),
        "zeta-alpha-ai/NanoNFCorpus": write_beir(folder / "NanoNFCorpus"),
    }


def write_data(folder):
    task = draw_task(0)
    names = (("corpus", task.corpus), ("queries", task.queries))
    (folder / "qrels").mkdir(parents=True)
    for name, texts in names:
        records = zip(texts.ids, texts.texts, strict=True)
        write_lines(folder / f"{name}.jsonl", [{"_id": i, "text": text} for i, text in records])
    lines = [
        f"{query_id}\t{doc_id}\t{grade}\n"
        for query_id, judged in task.qrels.items()
        for doc_id, grade in judged.items()
        if grade and doc_id != "gone"
    ]
    for split in ("train", "test"):
        text = "query-id\tcorpus-id\tscore\n" + "".join(lines)
        (folder / "qrels" / f"{split}.tsv").write_text(text)


def run_page(folder):
    """Run all blocks of the page in a folder; return the output by command."""
    replaced = SMALLER | {re.escape(name): str(path) for name, path in write_models(folder).items()}
    write_data(folder / "data")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        for language, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            for pattern, small in replaced.items():
                block = re.sub(pattern, small, block)
            if language == "yaml":
                name = block.splitlines()[0].removeprefix("# ")
                Path(name).write_text(block + "report_to: none\n")
                continue
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "splade-fast", line
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, (line, result.output, result.exception)
                printed[" ".join(arguments)] = result.stdout
    return printed


def find(printed, start):
    return [output for command, output in printed.items() if command.startswith(start)]


def check_all_steps(folder, printed):
    commands = [command.split()[0] for command in printed]
    assert set(commands) == {"train", "mine", "score", "evaluate", "merge", "encode"}
    assert len(commands) == 12


def check_lists_go_from_mining_to_distillation(folder, printed):
    mined = [json.loads(line) for line in (folder / "mined.jsonl").read_text().splitlines()]
    taught = list(load_training_data(str(folder / "ensemble.jsonl"), streaming=True))
    assert [row["documents"] for row in taught] == [[r["document"], *r["negatives"]] for r in mined]
    assert all(0 <= score <= 30 for row in taught for score in row["scores"])
    [report] = find(printed, "mine ")
    assert f"written\t{len(mined)}\n" in report
    assert "dropped by relative_margin\t" in report
    assert find(printed, "score mined.jsonl ensemble")[0].startswith(f"lists\t{len(mined)}\n")


def check_training_was_judged_and_compared(folder, printed):
    state = json.loads((folder / "second" / "trainer_state.json").read_text())
    last = [entry for entry in state["log_history"] if "eval_R@1000" in entry][-1]
    values = read_per_query(folder / "second.tsv")["data"]["nDCG@10"]
    assert last["eval_nDCG@10"] == pytest.approx(sum(values.values()) / len(values), abs=1e-5)
    compared = find(printed, "evaluate --data data --model second")[0].splitlines()
    assert compared[0].startswith("MRR@10\t")
    assert compared[3] == "data\tmeasure\tqueries\tmean\tother mean\tdifference\tp"
    [two_files] = find(printed, "evaluate --compare")
    assert [row.split("\t")[:6] for row in two_files.splitlines()[1:]] == [
        row.split("\t")[:6] for row in compared[4:]
    ]
    [several] = find(printed, "evaluate --data " + str(folder / "NanoSciFact"))
    assert [line.split("\t")[0] for line in several.splitlines()] == [
        *("data", "NanoSciFact", "NanoNFCorpus", "mean")
    ]


def check_the_merged_model_lies_between_its_checkpoints(folder, printed):
    models = ["second/checkpoint-1", "second/checkpoint-2", "merged"]
    weights = [dict(SpladeEncoder.from_pretrained(folder / m).named_parameters()) for m in models]
    for name, merged in weights[2].items():
        expected = (weights[0][name] + 2 * weights[1][name]) / 3
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert Index.load(folder / "index").meta.model == str(folder / "merged")


def test_every_command_runs_and_does_what_the_page_says(tmp_path):
    """One test, so that the commands run once however the tests are spread over processes."""
    printed = run_page(tmp_path)
    check_all_steps(tmp_path, printed)
    check_lists_go_from_mining_to_distillation(tmp_path, printed)
    check_training_was_judged_and_compared(tmp_path, printed)
    check_the_merged_model_lies_between_its_checkpoints(tmp_path, printed)
