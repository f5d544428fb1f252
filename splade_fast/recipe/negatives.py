"""Choice of hard negatives among the hits of a query, and the report of what was dropped."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from splade_fast._checks import check_count, check_integer

Sampling = Literal["top", "random"]

# Guards in the order in which a hit meets them; the first that drops it counts.
GUARDS = (
    "relevant",
    "equal_text",
    "duplicate",
    "max_score",
    "min_score",
    "relative_margin",
    "absolute_margin",
)


@dataclass(frozen=True)
class NegativeRules:
    """Rules by which the hits of a query become its hard negatives.

    A hit that scores nearly as much as the positive is often relevant, though nobody has judged
    it. The margins leave such hits out; NV-Retriever recommends relative_margin=0.05.

    Args:
        num_negatives: number of negatives of each pair of a query and a positive.
        min_negatives: pairs with fewer negatives are left out; by default num_negatives.
        first_rank: rank of the first hit that may be a negative, from 1.
        last_rank: rank of the last one.
        relative_margin: a negative scores at most (1 - relative_margin) times what the positive
            scores.
        absolute_margin: a negative scores at most what the positive scores less absolute_margin.
        max_score: largest score of a negative.
        min_score: least score of a negative.
        sampling: "top" takes the first hits that are left, "random" draws from all of them.
        seed: seed of the draws, which do not depend on the other queries.
        min_relevance: least relevance of a positive in the judgements.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a rule is out of range.

    Source: `NV-Retriever <https://arxiv.org/abs/2407.15831>`_, whose TopK-PercPos at 95 % is
    relative_margin=0.05.

    Example::

        >>> sf.recipe.NegativeRules(num_negatives=4, relative_margin=0.05).last_rank
        100
    """

    num_negatives: int = 8
    min_negatives: int | None = None
    first_rank: int = 1
    last_rank: int = 100
    relative_margin: float | None = None
    absolute_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: Sampling = "top"
    seed: int = 0
    min_relevance: int = 1

    def __post_init__(self) -> None:
        count = check_count("num_negatives", self.num_negatives, 1)
        check_count("first_rank", self.first_rank, 1)
        check_count("last_rank", self.last_rank, self.first_rank)
        check_count("min_relevance", self.min_relevance, 1)
        check_integer("seed", self.seed)
        if self.last_rank - self.first_rank + 1 < count:
            raise ValueError(
                f"num_negatives must be at most the {self.last_rank - self.first_rank + 1} ranks "
                f"from first_rank to last_rank, got {count}"
            )
        if self.min_negatives is not None:
            least = check_count("min_negatives", self.min_negatives, 1)
            if least > count:
                raise ValueError(
                    f"min_negatives must be at most num_negatives, {count}, got {least}"
                )
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be 'top' or 'random', got {self.sampling!r}")
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            raise ValueError(
                f"relative_margin must be at least 0 and below 1, got {self.relative_margin}"
            )
        if self.absolute_margin is not None and not 0 <= self.absolute_margin < math.inf:
            raise ValueError(
                f"absolute_margin must be finite and at least 0, got {self.absolute_margin}"
            )
        for name in ("max_score", "min_score"):
            limit = getattr(self, name)
            if limit is not None and not math.isfinite(limit):
                raise ValueError(f"{name} must be finite, got {limit}")


@dataclass
class MiningReport:
    """Counts of what became hard negatives, and of what did not.

    Args:
        queries: queries with a positive in the corpus.
        pairs: pairs of a query and a positive.
        written: pairs with enough negatives, which were written.
        negatives: negatives of these pairs.
        candidates: hits between first_rank and last_rank, over all pairs.
        dropped: hits that each guard dropped, over all pairs: `relevant` by the judgements,
            `equal_text` to the query or a positive, `duplicate` of a better hit's text, and those
            that break max_score, min_score, relative_margin or absolute_margin.

    Example::

        >>> list(sf.recipe.MiningReport(queries=2, pairs=3).lines())[:2]
        ['queries\\t2', 'pairs\\t3']
    """

    queries: int = 0
    pairs: int = 0
    written: int = 0
    negatives: int = 0
    candidates: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GUARDS, 0))

    def add(self, other: MiningReport) -> None:
        """Add the counts of other queries."""
        for name in ("queries", "pairs", "written", "negatives", "candidates"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for guard, count in other.dropped.items():
            self.dropped[guard] += count

    def lines(self) -> Iterator[str]:
        """Yield lines `name<TAB>count`; guards that dropped nothing are left out."""
        for name in ("queries", "pairs", "written", "negatives", "candidates"):
            yield f"{name}\t{getattr(self, name)}"
        for guard, count in self.dropped.items():
            if count:
                yield f"dropped by {guard}\t{count}"


@dataclass(frozen=True)
class Judged:
    """Query with its relevant documents.

    Args:
        query_id: id of the query.
        query: text of the query.
        positives: numbers of its relevant documents in the corpus.
        relevant_ids: ids of all its relevant documents, also of those that the corpus lacks.
    """

    query_id: str
    query: str
    positives: Sequence[int]
    relevant_ids: Collection[str]


def choose_negatives(
    judged: Judged,
    positive: int,
    positive_score: float,
    hits: Sequence[tuple[int, float]],
    ids: Sequence[str],
    texts: Sequence[str],
    rules: NegativeRules,
    report: MiningReport,
) -> list[int]:
    """Return the numbers of the hard negatives, best first, and count them in the report.

    Args:
        judged: the query.
        positive: number of the positive.
        positive_score: its score.
        hits: numbers and scores of the documents, best first, from rank 1.
        ids: ids of all documents.
        texts: texts of all documents.
        rules: rules of the choice.
        report: report to which the counts are added.
    """
    window = hits[rules.first_rank - 1 : rules.last_rank]
    seen = {normalise_text(texts[number]) for number in judged.positives}
    taken = seen | {normalise_text(judged.query)}
    kept: list[int] = []
    found: set[str] = set()
    for number, score in window:
        text = normalise_text(texts[number])
        guard = _find_guard(
            ids[number] in judged.relevant_ids,
            text in taken,
            text in found,
            score,
            positive_score,
            rules,
        )
        found.add(text)
        if guard is None:
            kept.append(number)
        else:
            report.dropped[guard] += 1
    report.pairs += 1
    report.candidates += len(window)
    chosen = kept[: rules.num_negatives]
    if rules.sampling == "random" and len(kept) > rules.num_negatives:
        draw = random.Random(f"{rules.seed}\t{judged.query_id}\t{ids[positive]}")
        places = draw.sample(range(len(kept)), rules.num_negatives)
        chosen = [kept[place] for place in sorted(places)]
    least = rules.num_negatives if rules.min_negatives is None else rules.min_negatives
    if len(chosen) < least:
        return []
    report.written += 1
    report.negatives += len(chosen)
    return chosen


def normalise_text(text: str) -> str:
    """Return a text whose white space counts as single blanks, for comparisons."""
    return " ".join(text.split())


def _find_guard(
    is_relevant: bool,
    is_equal: bool,
    is_duplicate: bool,
    score: float,
    positive_score: float,
    rules: NegativeRules,
) -> str | None:
    """Return the first guard that drops a hit, or None."""
    relative, absolute = rules.relative_margin, rules.absolute_margin
    drops = (
        is_relevant,
        is_equal,
        is_duplicate,
        rules.max_score is not None and score > rules.max_score,
        rules.min_score is not None and score < rules.min_score,
        relative is not None and score > positive_score * (1 - relative),
        absolute is not None and score > positive_score - absolute,
    )
    return next((guard for guard, drop in zip(GUARDS, drops, strict=True) if drop), None)
