"""Relevance losses equal their formulas in float64, written as loops over pairs."""

import math

import pytest
import torch

from splade_fast import losses

B, M = 5, 3


def scores(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(value, formula, *leaves):
    """Assert the value of the formula, and its gradient by finite differences."""
    assert value().item() == pytest.approx(formula(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda *_: value(), leaves)


def test_pointwise():
    x, labels = scores(B), torch.tensor([0, 1, 1, 0, 0.25])

    def formula():
        total = 0.0
        for score, label in zip(x.tolist(), labels.tolist(), strict=True):
            p = 1 / (1 + math.exp(-score))
            total -= label * math.log(p) + (1 - label) * math.log(1 - p)
        return total / B

    check(lambda: losses.pointwise_loss(x, labels), formula, x)
    integers = torch.tensor([0, 1, 1, 0, 1])
    expected = losses.pointwise_loss(x, integers.double())
    assert losses.pointwise_loss(x, integers).item() == expected.item()


@pytest.mark.parametrize("hard", [False, True])
def test_in_batch(hard):
    queries, documents, negatives = scores(B, 7), scores(B, 7), scores(4, 7)

    def formula():
        rows = [*documents.tolist(), *(negatives.tolist() if hard else [])]
        total = 0.0
        for i, query in enumerate(queries.tolist()):
            dots = [sum(a * b for a, b in zip(query, row, strict=True)) / 0.5 for row in rows]
            total -= dots[i] - math.log(sum(math.exp(dot) for dot in dots))
        return total / B

    def value():
        return losses.in_batch_loss(
            queries, documents, negatives if hard else None, temperature=0.5
        )

    check(value, formula, queries, documents, *([negatives] if hard else []))


def test_in_batch_weighs_negatives_by_hardness():
    """Values and gradients: the softmax p has the weights, which have no gradient themselves."""
    queries, documents, negatives = scores(B, 7), scores(B, 7), scores(4, 7)
    ids = torch.arange(B + 4)
    ids[2] = ids[0]  # copies are no negatives
    loss = losses.in_batch_loss(
        queries, documents, negatives, document_ids=ids, temperature=0.5, hardness=0.3
    )
    rows = torch.cat([documents, negatives]).detach()
    expected, gradients = 0.0, torch.zeros_like(queries)
    for i, query in enumerate(queries.detach()):
        logits = [float(query @ row) * (2 + (0.3 if j != i else 0)) for j, row in enumerate(rows)]
        kept = [j for j in range(len(rows)) if j == i or ids[j] != ids[i]]
        total = sum(math.exp(logits[j]) for j in kept)
        expected -= (logits[i] - math.log(total)) / B
        for j in kept:
            gradients[i] += 2 * rows[j] * (math.exp(logits[j]) / total - (i == j)) / B
    torch.testing.assert_close(loss.item(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, queries)[0], gradients)


@pytest.mark.parametrize("width", [None, 2])
def test_in_batch_leaves_out_copies(width):
    """Documents 0 and 3 and the negative 1 are one document, as are 1 and the negative 2."""
    queries, documents, negatives = scores(B, 7), scores(B, 7), scores(4, 7)
    names = [0, 1, 2, 0, 4, 5, 0, 1, 5]
    ids = torch.tensor(names) if width is None else torch.tensor([[name, 9] for name in names])

    def formula():
        rows = [*documents.tolist(), *negatives.tolist()]
        total = 0.0
        for i, query in enumerate(queries.tolist()):
            dots = [sum(a * b for a, b in zip(query, row, strict=True)) for row in rows]
            kept = [dot for j, dot in enumerate(dots) if j == i or names[j] != names[i]]
            total -= dots[i] - math.log(sum(math.exp(dot) for dot in kept))
        return total / B

    def value():
        return losses.in_batch_loss(queries, documents, negatives, document_ids=ids)

    check(value, formula, queries, documents, negatives)


@pytest.mark.parametrize("width", [None, 2])
def test_in_batch_leaves_out_documents_of_an_equal_query(width):
    """Queries 0, 2 and 4 are one query, whose id is 0 as the padding of the hard negatives."""
    queries, documents, negatives = scores(B, 7), scores(B, 7), scores(2, 7)
    names = [0, 1, 0, 3, 0]
    ids = torch.tensor(names) if width is None else torch.tensor([[name, 0] for name in names])

    def formula():
        rows = [*documents.tolist(), *negatives.tolist()]
        total = 0.0
        for i, query in enumerate(queries.tolist()):
            dots = [sum(a * b for a, b in zip(query, row, strict=True)) for row in rows]
            kept = [dot for j, dot in enumerate(dots) if j in (i, 5, 6) or names[j] != names[i]]
            total -= dots[i] - math.log(sum(math.exp(dot) for dot in kept))
        return total / B

    def value():
        return losses.in_batch_loss(queries, documents, negatives, query_ids=ids)

    check(value, formula, queries, documents, negatives)


def test_in_batch_of_one_document_falls_to_zero():
    queries, documents = scores(8, 7), scores(1, 7)
    copies = documents.expand(8, 7)
    apart = losses.in_batch_loss(queries, copies)
    assert apart.item() == pytest.approx(math.log(8))
    alike = losses.in_batch_loss(queries, copies, document_ids=torch.zeros(8, dtype=torch.int32))
    assert alike.item() == 0
    assert not torch.autograd.grad(alike, queries)[0].any()


@pytest.mark.parametrize("shape", [(B,), (B, M)])
def test_pairwise(shape):
    positive, negative = scores(B), scores(*shape)

    def formula():
        terms = [
            math.log1p(math.exp(n - p))
            for p, row in zip(positive.tolist(), negative.view(B, -1).tolist(), strict=True)
            for n in row
        ]
        return sum(terms) / len(terms)

    check(lambda: losses.pairwise_loss(positive, negative), formula, positive, negative)


@pytest.mark.parametrize("shape", [(B,), (B, M)])
def test_margin_mse(shape):
    positive, negative = scores(B), scores(*shape)
    teacher_positive, teacher_negative = torch.randn(B), torch.randn(*shape)

    def formula():
        terms = [
            ((p - n) - (tp - tn)) ** 2
            for p, row, tp, teacher_row in zip(
                positive.tolist(),
                negative.view(B, -1).tolist(),
                teacher_positive.tolist(),
                teacher_negative.view(B, -1).tolist(),
                strict=True,
            )
            for n, tn in zip(row, teacher_row, strict=True)
        ]
        return sum(terms) / len(terms)

    def value():
        return losses.margin_mse_loss(
            positive, negative, teacher_positive.double(), teacher_negative.double()
        )

    check(value, formula, positive, negative)


def test_kl_distillation():
    x, teacher = scores(B, M), torch.randn(B, M, dtype=torch.float64)

    def softmax(row):
        powers = [math.exp(value / 2) for value in row]
        return [power / sum(powers) for power in powers]

    def formula():
        total = 0.0
        for row, teacher_row in zip(x.tolist(), teacher.tolist(), strict=True):
            for p, q in zip(softmax(row), softmax(teacher_row), strict=True):
                total += q * (math.log(q) - math.log(p))
        return total / B * 4

    check(lambda: losses.kl_distillation_loss(x, teacher, temperature=2.0), formula, x)
    assert losses.kl_distillation_loss(x, x.detach()).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.pointwise_loss(torch.ones(2), torch.tensor([0.0, 1.5])),
            ValueError,
            "labels must be between 0 and 1, got 1.5",
        ),
        (
            lambda: losses.pointwise_loss(torch.ones(2), torch.tensor([0.0, math.nan])),
            ValueError,
            "labels must be between 0 and 1, got nan",
        ),
        (
            lambda: losses.pointwise_loss(torch.ones(2), [0.0, 1.0]),
            TypeError,
            "labels must be a tensor, got list",
        ),
        (
            lambda: losses.pointwise_loss(torch.ones(2), torch.ones(3)),
            ValueError,
            r"labels must be \(2,\), got \(3,\)",
        ),
        (
            lambda: losses.pointwise_loss(torch.ones(2).long(), torch.ones(2)),
            TypeError,
            "scores must be one of float32",
        ),
        (
            lambda: losses.in_batch_loss(torch.ones(2, 3), torch.ones(3, 3)),
            ValueError,
            r"documents must be \(2, 3\), got \(3, 3\)",
        ),
        (
            lambda: losses.in_batch_loss(torch.ones(2, 2, 3), torch.ones(2, 2, 3)),
            ValueError,
            r"queries must be \(batch, vocabulary\), got \(2, 2, 3\)",
        ),
        (
            lambda: losses.in_batch_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            r"vocabulary = 3, got \(2, 4\)",
        ),
        (
            lambda: losses.in_batch_loss(
                torch.ones(2, 3), torch.ones(2, 3), document_ids=torch.ones(2)
            ),
            TypeError,
            "document_ids must be integers, got torch.float32",
        ),
        (
            lambda: losses.in_batch_loss(
                torch.ones(2, 3), torch.ones(2, 3), document_ids=torch.arange(3)
            ),
            ValueError,
            r"document_ids must be \(2,\) or \(2, any\), got \(3,\)",
        ),
        (
            lambda: losses.in_batch_loss(
                torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3), query_ids=torch.arange(3)
            ),
            ValueError,
            r"query_ids must be \(2,\) or \(2, any\), got \(3,\)",
        ),
        (
            lambda: losses.in_batch_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=0),
            ValueError,
            "temperature must be greater than 0, got 0",
        ),
        (
            lambda: losses.in_batch_loss(torch.ones(2, 3), torch.ones(2, 3), hardness=-1.0),
            ValueError,
            "hardness must be at least 0 and finite, got -1.0",
        ),
        (
            lambda: losses.pairwise_loss(torch.ones(2, 2), torch.ones(2, 2)),
            ValueError,
            r"got \(2, 2\) and \(2, 2\)",
        ),
        (
            lambda: losses.pairwise_loss(torch.ones(2), torch.ones(3)),
            ValueError,
            r"got \(2,\) and \(3,\)",
        ),
        (
            lambda: losses.margin_mse_loss(*(torch.ones(2),) * 2, torch.ones(3), torch.ones(2)),
            ValueError,
            r"teacher_positive must be \(2,\), got \(3,\)",
        ),
        (
            lambda: losses.kl_distillation_loss(torch.ones(2), torch.ones(2)),
            ValueError,
            r"scores must be \(batch, documents\), got \(2,\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
