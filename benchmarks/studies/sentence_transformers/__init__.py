"""sentence-transformers' SparseEncoder against itself accelerated."""
