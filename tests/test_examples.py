"""Examples in the docstrings of the public API run, on a tiny checkpoint."""

import doctest
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import splade_fast as sf
from tests.tiny_models import masked_lm_configs, save_checkpoint

PACKAGES = [
    "splade_fast",
    "splade_fast.export",
    "splade_fast.integrations.mteb",
    "splade_fast.integrations.sentence_transformers",
    "splade_fast.losses",
    "splade_fast.negative_cache",
    "splade_fast.recipe",
    "splade_fast.training",
]


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield name and object of each public function and class."""
    seen = set()
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                yield f"{package}.{name}", value


PUBLIC = dict(public_objects())


def parts(value: Any) -> Iterator[Callable[..., Any]]:
    """Yield an object and, for a class, its public methods."""
    yield value
    if inspect.isclass(value):
        for name, member in vars(value).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not name.startswith("_") and inspect.isfunction(function):
                yield function


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, checkpoint, tmp_path, monkeypatch):
    """Each object has an example in its own docstring or, for a class, in that of a method."""
    monkeypatch.chdir(tmp_path)
    examples = 0
    for part in parts(PUBLIC[name]):
        text = (inspect.getdoc(part) or "").replace("CHECKPOINT", str(checkpoint))
        names = {"sf": sf, "torch": torch, "np": np}
        test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        torch.manual_seed(0)
        runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)
        examples += len(test.examples)
    assert examples, f"{name} has no example"
