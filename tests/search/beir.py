"""Small judged sets in the layout of BEIR, as folders and as data sets."""

import gzip
import json
from pathlib import Path

import datasets

CORPUS = [
    {"_id": "d1", "title": "A fox", "text": "quick and brown"},
    {"_id": "d2", "title": "", "text": "the lazy dog"},
    {"_id": "d3", "title": "", "text": "an old tree"},
]
QUERIES = [{"_id": "q1", "text": "fox"}, {"_id": "q2", "text": "old dog"}]
QRELS = {"q1": {"d1": 2}, "q2": {"d2": 1, "d3": 0}}
TRAIN_QRELS = {"q2": {"d3": 1}}


def write_lines(path: Path, records) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def list_judgements(qrels):
    return [
        {"query-id": query_id, "corpus-id": doc_id, "score": grade}
        for query_id, judged in qrels.items()
        for doc_id, grade in judged.items()
    ]


def write_beir(folder: Path, *, suffix: str = "", queries=QUERIES, qrels=QRELS) -> Path:
    """Write a BEIR folder with the splits test and train."""
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / f"corpus.jsonl{suffix}", CORPUS)
    write_lines(folder / f"queries.jsonl{suffix}", queries)
    for split, judgements in (("test", qrels), ("train", TRAIN_QRELS)):
        lines = ["query-id\tcorpus-id\tscore\n"]
        lines += [
            f"{q}\t{d}\t{grade}\n" for q, row in judgements.items() for d, grade in row.items()
        ]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines))
    return folder


def write_data_set(folder: Path, *, judgements: str, splits: dict[str, list[str]]) -> Path:
    """Write a data set with three configurations, as the hub has it.

    Args:
        folder: its folder.
        judgements: configuration of the judgements.
        splits: splits of each configuration; those of judgements hold the grades of one split each.
    """
    qrels = [
        [
            {"query-id": q, "corpus-id": d, "score": s}
            for q, row in one.items()
            for d, s in row.items()
        ]
        for one in (QRELS, TRAIN_QRELS)
    ]
    if judgements == "qrels":  # NanoBEIR lists relevant documents alone
        qrels = [
            [{"query-id": r["query-id"], "corpus-id": r["corpus-id"]} for r in rows if r["score"]]
            for rows in qrels
        ]
    contents = {"corpus": [CORPUS] * 2, "queries": [QUERIES] * 2, judgements: qrels}
    lines = ["---", "configs:"]
    for configuration, rows in contents.items():
        lines += [f"- config_name: {configuration}", "  data_files:"]
        for split, records in zip(splits[configuration], rows, strict=False):
            file = folder / configuration / f"{split}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(records).to_parquet(file)
            lines += [f"  - split: {split}", f"    path: {configuration}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder
