"""python -m benchmarks.studies.training: measure, and keep the numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.harness.drawing import draw_if_possible
from benchmarks.harness.facts import recorded
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv
from benchmarks.studies.training.facts import Fact, Finding, findings_of, format_findings
from examples.docstrings.checkpoint import demo_checkpoint
from examples.docstrings.corpus import Pair, docstring_pairs
from examples.docstrings.training import split_pairs
from examples.docstrings.training_cost import (
    CONTENDERS,
    Setting,
    batch_within,
    long_pairs,
    step_cost,
)

LOSSES = ("negative_cache", "in_batch")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    path = options.out / "training-cpu.csv"
    if options.report:
        facts = read_csv(Fact, path)
        print(format_findings(facts))
        draw_if_possible("benchmarks.studies.training.plots", facts, path)
        return 0
    torch.set_num_threads(options.threads)
    machine = Machine.current("cpu")
    print(machine.title, flush=True)
    model = options.model or str(demo_checkpoint())
    pairs = split_pairs(docstring_pairs()).training
    pairs = long_pairs(pairs, AutoTokenizer.from_pretrained(model))
    # What is there of losses that are not measured now stays.
    old = read_csv(Fact, path) if path.exists() else []
    facts = [fact for fact in old if fact.loss not in options.loss]
    for loss in options.loss:
        found = _study(loss, model, pairs, options)
        print(format_findings(found), flush=True)
        facts += recorded(found, Fact, machine)
        write_csv(facts, Fact, path)
    draw_if_possible("benchmarks.studies.training.plots", facts, path)
    return 0


def _study(
    loss: str, model: str, pairs: Sequence[Pair], options: argparse.Namespace
) -> list[Finding]:
    limit = options.memory * 1024
    costs, batches = {}, {}
    for contender in CONTENDERS:
        setting = Setting(
            contender,
            loss,
            batch_size=options.batch_size,
            steps=options.steps,
            cache_size=options.cache_size,
            threads=options.threads,
        )
        costs[contender] = step_cost(setting, model, pairs)
        if limit:
            batches[contender] = batch_within(limit, setting, costs[contender], model, pairs)
    return findings_of(loss, costs, batches, limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.training", description=__doc__
    )
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=Setting.batch_size)
    parser.add_argument("--cache-size", type=int, default=Setting.cache_size)
    parser.add_argument(
        "--memory", type=float, default=4, help="GiB for the largest batch; 0: do not look for it"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--model", help="a checkpoint; default: the demo's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: print and plot the CSV in OUT"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
