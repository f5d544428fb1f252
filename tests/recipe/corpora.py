"""Small judged corpora with equal texts, and encoders whose scores differ."""

import random

import torch

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.recipe import MiningTask
from splade_fast.search.texts import Texts
from tests.tiny_models import WORDS, make_tokenizer


class WeightedWords(BagOfWordsQueryEncoder):
    """Bag of words with a random weight for each word.

    Args:
        fail_at: number of the call of `encode` that fails, from 0.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        tokenizer = make_tokenizer()
        generator = torch.Generator().manual_seed(1)
        super().__init__(tokenizer, torch.rand(len(tokenizer), generator=generator) + 0.5)
        self.fail_at = fail_at
        self.calls = 0
        self.eval()

    def encode(self, *arguments, **options):
        if self.calls == self.fail_at:
            raise OSError("disk full")
        self.calls += 1
        return super().encode(*arguments, **options)


def draw_task(seed: int, queries: int = 7, documents: int = 60) -> MiningTask:
    """Draw a task in which documents repeat each other, the queries and the positives."""
    draw = random.Random(seed)
    doc_ids = [f"d{number}" for number in draw.sample(range(1000), documents)]
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in doc_ids]
    query_texts = [" ".join(draw.choices(WORDS, k=3)) for _ in range(queries)]
    for number in range(0, documents, 9):  # with other white space
        texts[number] = draw.choice(texts).replace(" ", "  ")
    texts[draw.randrange(documents)] = query_texts[0]
    query_ids = [f"q{number}" for number in range(queries)]
    qrels = {
        query_id: {doc_id: draw.randint(0, 2) for doc_id in draw.sample(doc_ids, 3)} | {"gone": 1}
        for query_id in query_ids
    }
    qrels[query_ids[-1]] = dict.fromkeys(doc_ids[:2], 0)  # without a positive
    return MiningTask(Texts(query_ids, query_texts), Texts(doc_ids, texts), qrels)


def write_task(task: MiningTask, folder) -> list[str]:
    """Write the files of a task, and return the options that name them."""
    for name, texts in (("queries", task.queries), ("corpus", task.corpus)):
        lines = (f"{i}\t{text}\n" for i, text in zip(texts.ids, texts.texts, strict=True))
        (folder / f"{name}.tsv").write_text("".join(lines))
    judgements = [
        f"{query} {doc} {grade}\n"
        for query, row in task.qrels.items()
        for doc, grade in row.items()
    ]
    (folder / "qrels.txt").write_text("".join(judgements))
    files = {"queries": "queries.tsv", "corpus": "corpus.tsv", "qrels": "qrels.txt"}
    return [part for name, file in files.items() for part in (f"--{name}", str(folder / file))]
