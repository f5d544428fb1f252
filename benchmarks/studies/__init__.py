"""Studies: one question each, answered by more than one case."""
