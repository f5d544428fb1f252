"""DistributedDataParallel over real processes against one process with the joined batch."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from splade_fast.negative_cache import sources
from tests.ranks import run_ranks
from tests.selection import ALL, covering_rows
from tests.training.models import assert_same_gradients, batch_of, gradients, training_model

PENALTIES = {
    "query_regularizer": "l1+anti_zero",
    "document_regularizer": "flops+df_flops",
    "lambda_query": 0.1,
    "lambda_document": 0.2,
    "df_momentum": 0.5,
    "temperature": 3.0,
}
DOCUMENTS = {"in_batch": 2, "pointwise": 1, "pairwise": 3, "margin_mse": 2, "kl": 3}
PARTS = {2: [2, 4], 3: [2, 1, 3]}  # queries of each rank
CACHE = {"cache_size": 9, "cache_document_length": 16, "cache_in_batch": False}
STEPS = 5

_VALUES = [list(PARTS), list(DOCUMENTS), [None, 1]]  # ranks, loss, mini_batch_size
CASES = (
    list(itertools.product(*_VALUES))
    if os.environ.get(ALL)
    else [
        tuple(values[i] for values, i in zip(_VALUES, row, strict=True))
        for row in covering_rows([len(values) for values in _VALUES])
    ]
)


def make_labels(loss: str, batch: int, documents: int) -> torch.Tensor | None:
    shape = {"pointwise": (batch,), "margin_mse": (batch, documents), "kl": (batch, documents)}
    return torch.rand(shape[loss], dtype=torch.float64) if loss in shape else None


def joined_batch(encoder, loss: str, batch: int, seed: int = 0) -> dict:
    documents = DOCUMENTS.get(loss, 1)
    torch.manual_seed(seed)
    joined = batch_of(encoder, batch, seed, documents)
    if loss in DOCUMENTS:
        for tokens in joined["queries"].values():
            tokens[-2] = tokens[0]  # one query, on the first rank and on another one
        for tokens in joined["documents"].values():
            # The last rank has the first one's positive, and that query has it as a negative.
            tokens[batch - 1] = tokens[0]
            if documents > 1:
                tokens[batch] = tokens[0]
    return {**joined, "labels": make_labels(loss, batch, documents)}


def take_part(batch: dict, sizes: list[int], rank: int) -> dict:
    """Return the queries of a rank with all their documents."""
    mine = torch.arange(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    count = len(batch["documents"]["input_ids"]) // sum(sizes)
    documents = torch.cat([j * sum(sizes) + mine for j in range(count)])
    labels = batch["labels"]
    return {
        "queries": {name: x[mine] for name, x in batch["queries"].items()},
        "documents": {name: x[documents] for name, x in batch["documents"].items()},
        "labels": None if labels is None else labels[mine],
    }


def parts_are_the_joined_batch(rank, count, expectations):
    """Compare loss and gradients of two steps; the second uses the frequencies of both."""
    steps_of_losses = torch.load(expectations)
    for number_of_ranks, loss, mini_batch_size in CASES:
        if number_of_ranks != count:
            continue
        model = training_model(loss=loss, mini_batch_size=mini_batch_size, **PENALTIES)
        parallel = DistributedDataParallel(model)
        for step, (expected, expected_gradients) in enumerate(steps_of_losses[loss]):
            batch = joined_batch(model.encoder, loss, sum(PARTS[count]), step)
            result = parallel(**take_part(batch, PARTS[count], rank))
            actual = gradients(model, result["loss"])
            torch.testing.assert_close(result["loss"].detach(), expected)
            assert_same_gradients(actual, expected_gradients)


@pytest.mark.parametrize("count", PARTS)
def test_unequal_batches_of_ranks_are_one_batch(count, tmp_path):
    steps_of_losses = {}
    for loss in DOCUMENTS:
        model = training_model(loss=loss, **PENALTIES)
        steps = []
        for step in range(2):
            result = model(**joined_batch(model.encoder, loss, sum(PARTS[count]), step))
            steps.append((result["loss"].detach(), gradients(model, result["loss"])))
        steps_of_losses[loss] = steps
    torch.save(steps_of_losses, tmp_path / "expectations")
    run_ranks(count, parts_are_the_joined_batch, tmp_path, str(tmp_path / "expectations"))


def train_with_a_cache(rank, count, folder, arguments, sizes):
    """Train, and write the state before each step, its loss and its gradient."""
    sources._QUERIES_PER_RANK = sizes[0]  # so that draws are those of the joined batch
    model = training_model(**arguments, seed=3 + rank * (arguments["cache_sharing"] == "shards"))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handler = model.objective.handler
    for step in range(STEPS):
        start = Path(folder) / str(step)
        model.save_cache(start / "cache")
        if rank == 0:
            save_file(dict(model.encoder.model.named_parameters()), start / "weights")
        batch = joined_batch(model.encoder, "negative_cache", sum(sizes), step % 3)
        result = parallel(**take_part(batch, sizes, rank))
        found = gradients(model.encoder, result["loss"])
        if rank == 0:
            metrics = result["metrics"].items()
            seen = {name: value for name, value in metrics if not name.endswith("active_dims")}
            save_file({"loss": result["loss"].detach(), **seen}, start / "values")
            save_file(found, start / "gradients")
        optimizer.step()
        valid = [torch.empty_like(handler.cache.valid) for _ in range(count)]
        if arguments["cache_sharing"] == "replicas":
            dist.all_gather(valid, handler.cache.valid)
            assert all(torch.equal(other, handler.cache.valid) for other in valid)
            assert int(handler.cache.valid.sum()) == min(9, (step + 1) * sum(sizes))
    shared = arguments["cache_sharing"] == "replicas"
    assert handler.cache.size == (9 if shared else len(range(rank, 9, count)))


@pytest.mark.parametrize(("count", "embeddings"), [(2, "sparse"), (3, "dense")])
@pytest.mark.parametrize("sharing", ["replicas", "shards"])
def test_caches_of_ranks_are_one_cache(count, sharing, embeddings, tmp_path):
    """Compare each step of the ranks with that of one process that reads their caches."""
    sizes = PARTS[count] if sharing == "shards" else [2] * count
    arguments = {
        "loss": "negative_cache", **CACHE, **PENALTIES, "document_regularizer": "flops",
        "cache_sharing": sharing, "cache_embeddings": embeddings,
    }  # fmt: skip
    run_ranks(count, train_with_a_cache, tmp_path, str(tmp_path), arguments, sizes)
    drawn = 0
    for step in range(STEPS):
        start = tmp_path / str(step)
        model = training_model(**arguments)
        model.encoder.model.load_state_dict(load_file(start / "weights"), strict=False)
        model.load_cache(start / "cache")
        batch = joined_batch(model.encoder, "negative_cache", sum(sizes), step % 3)
        result = model(**batch)
        values = load_file(start / "values")
        torch.testing.assert_close(result["loss"].detach(), values.pop("loss"))
        for name, value in values.items():
            torch.testing.assert_close(result["metrics"][name], value, msg=name)
        assert_same_gradients(
            gradients(model.encoder, result["loss"]), load_file(start / "gradients")
        )
        drawn += bool(values["cache/interpretable_prediction_loss"] > 0)
    assert drawn == STEPS - 1  # all but the first, whose cache is empty
