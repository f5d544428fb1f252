"""Training of encoders: objective, trainer, data and evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splade_fast.training.gradient_cache import cached_encode
    from splade_fast.training.model import TrainingModel
    from splade_fast.training.objective import Objective, ObjectiveArguments

# Loaded on first use, because some need packages that only the extra "train" installs.
_MODULES = {
    "MeanEvaluator": "evaluator",
    "Objective": "objective",
    "ObjectiveArguments": "objective",
    "RetrievalEvaluator": "evaluator",
    "SpladeTrainer": "trainer",
    "SpladeTrainingArguments": "arguments",
    "TrainingCollator": "data",
    "TrainingModel": "model",
    "cached_encode": "gradient_cache",
    "load_training_data": "data",
}

__all__ = [
    "MeanEvaluator",
    "Objective",
    "ObjectiveArguments",
    "RetrievalEvaluator",
    "SpladeTrainer",
    "SpladeTrainingArguments",
    "TrainingCollator",
    "TrainingModel",
    "cached_encode",
    "load_training_data",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"splade_fast.training.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
