"""Why and when the screened head pays: measurements beyond the cases, run by hand.

`python -m benchmarks study screening [STUDIES...]` measures the studies below, one module each, and
keeps their numbers in one CSV, where a new run of a study replaces its old numbers for that model.

- survivors: what the bound leaves over, with and without what makes it tight.
- sweep: time against the share of active entries, and where the dense product becomes faster.
- sizes: what choosing costs in small calls.
- prepare: what the int8 weight costs in time and memory, beside a training step.
- encode: texts to pruned vectors, stage by stage, and beside sentence-transformers.
"""
