"""score_with_teachers: scores of one or several teachers, for the losses margin_mse and kl."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from splade_fast._checks import check_count
from splade_fast.recipe.lists import TextList, iterate_lists
from splade_fast.recipe.part_files import PartFiles
from splade_fast.recipe.teachers import Teacher
from splade_fast.recipe.weights import check_weights
from splade_fast.search.checksum import count_and_checksum
from splade_fast.search.source_files import check_rereadable
from splade_fast.search.texts import Texts

Normalization = Literal["none", "min-max", "z-score"]


@dataclass
class ScoreReport:
    """Counts of what was scored.

    Args:
        lists: number of lists.
        documents: number of their documents.
        first_is_best: number of lists whose first document, the positive, has the highest score.

    Example::

        >>> list(sf.recipe.ScoreReport(lists=4, documents=12, first_is_best=3).lines())[-1]
        'lists whose first document scores highest\\t75.0%'
    """

    lists: int = 0
    documents: int = 0
    first_is_best: int = 0

    def lines(self) -> Iterator[str]:
        """Yield lines `name<TAB>value`."""
        yield f"lists\t{self.lists}"
        yield f"documents\t{self.documents}"
        yield f"lists whose first document scores highest\t{self.first_is_best / self.lists:.1%}"


def score_with_teachers(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    teachers: Sequence[Teacher],
    *,
    weights: Sequence[float] | None = None,
    normalize: Normalization | None = None,
    scale: float = 1.0,
    queries: Texts | None = None,
    corpus: Texts | None = None,
    chunk_size: int = 1024,
    resume: bool = False,
    show_progress: bool = True,
) -> ScoreReport:
    """Write scale · Σ wᵢ norm(scoresᵢ) / Σ wᵢ for the documents of each list.

    A line of the file is an object with query, documents and scores, and query_id and document_ids
    where the source has them. `load_training_data` reads it as scored lists, for the losses
    margin_mse and kl. The file appears complete or not at all.

    The scores of a teacher are normalised over the documents of each query: min-max maps them to
    (s - min) / (max - min), z-score to (s - mean) / standard deviation. Equal scores become 0.

    One chunk of lists is held in memory. Chunks that are finished stay after an error, and after
    the end of the program at any time; `resume=True` goes on with them.

    Args:
        source: file of lists: JSON lines or triples with a query, a positive and negatives, as
            `mine_hard_negatives` writes them, or with a query and documents.
        path: file to write; must not exist.
        teachers: the teachers; see `load_teacher`.
        weights: a weight for each teacher, at least 0; all 1 by default.
        normalize: "none", "min-max" or "z-score"; by default "none" for one teacher and "min-max"
            for several.
        scale: factor of the mean, for scores of the size that the student gives.
        queries: texts of the queries, where the source holds ids alone.
        corpus: texts of the documents, likewise. The result then holds ids alone as well.
        chunk_size: number of lists that are scored at a time; the teachers see a text that occurs
            several times in them once.
        resume: go on with the chunks that an interrupted call has finished.
        show_progress: draw a progress bar.

    Raises:
        TypeError: a count is not an integer.
        ValueError: an argument is out of range, a line of the source is malformed, a score is not
            finite, or the chunks belong to other data, teachers or settings.
        FileExistsError: `path` exists.
        OSError: the file system failed.

    Source: the ensemble is that of Geng et al. 2024, https://arxiv.org/abs/2411.04403, with min-max
    and a scale of 30.

    Example::

        >>> from splade_fast.recipe import BM25Teacher, EncoderTeacher, score_with_teachers
        >>> with open("triples.tsv", "w") as file:
        ...     _ = file.write("fox\\ta quick fox\\tan old tree\\n")
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> teachers = [BM25Teacher(["a quick fox", "an old tree"]), EncoderTeacher(encoder)]
        >>> score_with_teachers("triples.tsv", "scored.jsonl", teachers, show_progress=False).lists
        1
    """
    chunk_size = check_count("chunk_size", chunk_size, 1)
    combine = _Ensemble.make(teachers, weights, normalize, scale)
    check_rereadable(source)
    parts = PartFiles(path)

    lookups = _by_id(queries), _by_id(corpus)
    count, crc = count_and_checksum(
        (found.query, *found.documents) for found in iterate_lists(source, *lookups)
    )
    settings = combine.settings() | {"lists": crc, "chunk_size": chunk_size}
    report = ScoreReport()
    with (
        parts.claim(settings, resume=resume, verb="score"),
        tqdm(total=count, unit="list", disable=not show_progress) as progress,
    ):
        lists = iterate_lists(source, *lookups)
        number = 0
        while chunk := list(islice(lists, chunk_size)):
            notes = parts.read_notes(number)
            if notes is None:
                scores = combine([one.query for one in chunk], [one.documents for one in chunk])
                notes = asdict(_count(scores))
                parts.write(number, notes, map(_line, chunk, scores))
            for name, value in notes.items():
                setattr(report, name, getattr(report, name) + value)
            progress.update(len(chunk))
            number += 1
        parts.join(number)
    return report


@dataclass(frozen=True)
class _Ensemble:
    """Weighted mean of the normalised scores of teachers."""

    teachers: Sequence[Teacher]
    weights: Sequence[float]
    normalize: Normalization
    scale: float

    @classmethod
    def make(
        cls,
        teachers: Sequence[Teacher],
        weights: Sequence[float] | None,
        normalize: Normalization | None,
        scale: float,
    ) -> _Ensemble:
        """Check the arguments of `score_with_teachers`."""
        if not teachers:
            raise ValueError("teachers must hold at least one teacher, got none")
        factors = check_weights(weights, len(teachers), "teacher")
        if normalize is None:
            normalize = "none" if len(teachers) == 1 else "min-max"
        if normalize not in get_args(Normalization):
            raise ValueError(
                f"normalize must be one of {', '.join(get_args(Normalization))}, got {normalize!r}"
            )
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be finite and greater than 0, got {scale}")
        return cls(teachers, factors, normalize, scale)

    def settings(self) -> dict[str, Any]:
        """Return what the scores depend on, beside the lists."""
        return {
            "teachers": [teacher.name for teacher in self.teachers],
            "weights": list(self.weights),
            "normalize": self.normalize,
            "scale": self.scale,
        }

    def __call__(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Return the scores of each list."""
        totals = [torch.zeros(len(texts), dtype=torch.float64) for texts in documents]
        for teacher, weight in zip(self.teachers, self.weights, strict=True):
            for i, scores in enumerate(teacher(queries, documents)):
                exact = torch.as_tensor(scores).detach().cpu().double()
                if exact.shape != totals[i].shape:
                    raise ValueError(
                        f"{teacher.name} must give {len(totals[i])} scores for {queries[i]!r}, "
                        f"got shape {tuple(exact.shape)}"
                    )
                if not exact.isfinite().all():
                    raise ValueError(
                        f"{teacher.name} must give finite scores, got {exact.tolist()} for "
                        f"{queries[i]!r}"
                    )
                totals[i] += weight * _NORMALIZATIONS[self.normalize](exact)
        factor = self.scale / sum(self.weights)
        return [(factor * total).tolist() for total in totals]


def _scale_to_unit(scores: Tensor) -> Tensor:
    low, high = scores.aminmax()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def _standardize(scores: Tensor) -> Tensor:
    deviation = scores.std(correction=0)
    is_constant = bool(scores.min() == scores.max())
    return torch.zeros_like(scores) if is_constant else (scores - scores.mean()) / deviation


_NORMALIZATIONS: dict[Normalization, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "min-max": _scale_to_unit,
    "z-score": _standardize,
}


def _by_id(texts: Texts | None) -> Mapping[str, str] | None:
    return None if texts is None else dict(zip(texts.ids, texts.texts, strict=True))


def _count(scores: Sequence[Sequence[float]]) -> ScoreReport:
    return ScoreReport(
        len(scores),
        sum(len(row) for row in scores),
        sum(row[0] > max(row[1:]) for row in scores),
    )


def _line(found: TextList, scores: Sequence[float]) -> dict[str, Any]:
    """Return the object of a list, with its texts unless the source has ids alone."""
    line: dict[str, Any] = {}
    if found.query_id is not None:
        line["query_id"] = found.query_id
    if found.has_texts:
        line["query"] = found.query
    if found.document_ids is not None:
        line["document_ids"] = found.document_ids
    if found.has_texts:
        line["documents"] = found.documents
    return line | {"scores": scores}
