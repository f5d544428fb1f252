"""Search: texts, index folders, encoding of a corpus, evaluation."""
