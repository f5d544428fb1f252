"""Demo with a real checkpoint and a real corpus, both from Python packages, without a model hub."""
