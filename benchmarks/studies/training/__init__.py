"""What the ops buy in training: the same trainer with them, and with plain PyTorch.

`python -m benchmarks study training` trains the demo's checkpoint on real docstrings, each
contender in a process of its own, with the negative cache (sparse for ours, dense for plain
PyTorch) and with in-batch negatives alone, and keeps seconds per step, peak memory, the largest
batch in a given memory and the losses of all steps in one CSV, with a plot beside it.
"""
