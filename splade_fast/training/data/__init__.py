"""Training data: files and data sets to examples, and examples to batches."""

from splade_fast.training.data.collator import TrainingCollator
from splade_fast.training.data.load import load_training_data

__all__ = ["TrainingCollator", "load_training_data"]
