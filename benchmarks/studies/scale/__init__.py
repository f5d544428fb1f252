"""How time and memory grow with size: five sizes or more, and a power law through them.

`python -m benchmarks study scale [STUDIES...]` measures the studies below, each size in a process
of its own, and keeps the numbers in one CSV, where a new run of a size replaces its old numbers;
the fitted exponents are in a second one, and a plot beside them.

- encode: real docstrings to an index folder, against the number of documents.
- load: an index folder opened, against the number of documents.
- search: exact search of synthetic SPLADE rows in a memory-mapped file, against their number.
- cache: a draw from the negative cache and an update of it, against its slots.
- vocabulary: the head's forward and backward, against V.
- length: the head's and the pool's forward and backward, against L.

What 100 million documents would need on 8 GPUs is computed from the numbers (`on_paper`).
"""
