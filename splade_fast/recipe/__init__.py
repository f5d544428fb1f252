"""Steps of a training recipe around the training itself: mine, score and merge."""

from splade_fast.recipe.merge import merge_checkpoints
from splade_fast.recipe.mine import mine_hard_negatives
from splade_fast.recipe.negatives import MiningReport, NegativeRules
from splade_fast.recipe.score import ScoreReport, score_with_teachers
from splade_fast.recipe.tasks import MiningTask
from splade_fast.recipe.teachers import (
    BM25Teacher,
    CrossEncoderTeacher,
    EncoderTeacher,
    SentenceTransformerTeacher,
    Teacher,
    load_teacher,
)

__all__ = [
    "BM25Teacher",
    "CrossEncoderTeacher",
    "EncoderTeacher",
    "MiningReport",
    "MiningTask",
    "NegativeRules",
    "ScoreReport",
    "SentenceTransformerTeacher",
    "Teacher",
    "load_teacher",
    "merge_checkpoints",
    "mine_hard_negatives",
    "score_with_teachers",
]
