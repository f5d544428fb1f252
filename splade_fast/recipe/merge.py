"""merge_checkpoints: one model from several that were trained from the same start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from splade_fast._atomic_files import new_folder
from splade_fast.encoders.text_encoder import TextEncoder
from splade_fast.recipe.weights import check_weights
from splade_fast.search.fingerprint import digest_vocabulary
from splade_fast.search.models import QUERY_FOLDER, load_document_encoder, load_own_query_encoder

Method = Literal["average", "slerp"]

# Entries of a configuration that say where a model comes from, not what it computes.
_OF_ORIGIN = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
_PARALLEL = 1e-6  # sine of an angle below which the formula of slerp would divide by about 0


@torch.no_grad()
def merge_checkpoints(
    models: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "average",
    show_progress: bool = True,
) -> int:
    """Write a folder of weights Σ wᵢ θᵢ / Σ wᵢ, or of weights on the arc between two models.

    average is the mean of each parameter, slerp the spherical interpolation of each tensor:

        sin((1 - t) φ) / sin φ · θ₀ + sin(t φ) / sin φ · θ₁,  t = w₁ / (w₀ + w₁)

    with the angle φ between the two tensors. Sums are computed in float64 and rounded once. The
    settings and the tokenizer are those of the first model. An encoder of queries in the models'
    folders is merged likewise. All models are held in memory.

    Args:
        models: hub names or folders of at least two models, two for slerp.
        path: folder to write; must not exist. It appears complete or not at all.
        weights: a weight for each model, at least 0; all 1 by default.
        method: "average" or "slerp".
        show_progress: draw a progress bar.

    Returns:
        Number of merged tensors.

    Raises:
        FileExistsError: `path` exists.
        OSError: there is no such model, or the file system failed.
        ValueError: an argument is out of range, or the models differ in their class, configuration,
            settings, vocabulary, or the names, shapes or dtypes of their tensors, or have adapters.

    Source: `Model soups <https://arxiv.org/abs/2203.05482>`_; slerp is Shoemake 1985.

    Example::

        >>> sf.SpladeEncoder.from_pretrained("CHECKPOINT").save_pretrained("a")
        >>> sf.recipe.merge_checkpoints(["CHECKPOINT", "a"], "merged", show_progress=False) > 10
        True
    """
    names = [os.fspath(model) for model in models]
    if method not in get_args(Method):
        raise ValueError(f"method must be 'average' or 'slerp', got {method!r}")
    if len(names) < 2 or (method == "slerp" and len(names) > 2):
        expected = "exactly" if method == "slerp" else "at least"
        raise ValueError(f"models must be {expected} two for {method}, got {len(names)}")
    factors = check_weights(weights, len(names), "model")
    with new_folder(path) as folder:
        documents = [load_document_encoder(name) for name in names]
        queries = _load_query_encoders(names)
        for encoders in (documents, queries):
            for encoder, name in zip(encoders[1:], names[1:], strict=False):
                _check_alike(encoders[0], encoder, names[0], name)
        pairs = list(_list_tensors(documents)) + list(_list_tensors(queries))
        for tensors in tqdm(pairs, unit="tensor", disable=not show_progress):
            _merge(tensors, factors, method)
        _save(documents[0], folder)
        if queries:
            _save(queries[0], folder / QUERY_FOLDER)
    return len(pairs)


def _load_query_encoders(names: Sequence[str]) -> list[TextEncoder]:
    """Return the models' own encoders of queries; none if no model has one."""
    found = [load_own_query_encoder(name) for name in names]
    lacking = [name for name, own in zip(names, found, strict=True) if own is None]
    if 0 < len(lacking) < len(names):
        raise ValueError(
            f"all models must have an encoder of queries or none, got none in {lacking[0]}"
        )
    return [own[1] for own in found if own is not None]


def _check_alike(first: TextEncoder, other: TextEncoder, first_name: str, name: str) -> None:
    """Raise ValueError unless two encoders differ in the values of their weights alone."""

    def check(what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise ValueError(f"{name} must have the {what} of {first_name}, {expected}, got {got}")

    check("class", type(first).__name__, type(other).__name__)
    for encoder, own_name in ((first, first_name), (other, name)):
        if _has_adapters(encoder):
            raise ValueError(
                f"{own_name} must have no adapters, whose product is not merged by merging them; "
                "PEFT's merge_and_unload puts them into their base model"
            )
    configurations = _configuration(first), _configuration(other)
    for key in sorted(configurations[0].keys() | configurations[1].keys()):
        check(f"{key} in config.json", *(found.get(key) for found in configurations))
    settings = [replace(encoder.settings, subfolder="") for encoder in (first, other)]
    check("settings", *settings)
    if digest_vocabulary(first.tokenizer) != digest_vocabulary(other.tokenizer):
        raise ValueError(f"{name} must have the vocabulary of {first_name}, got another tokenizer")
    mine, theirs = _tensors(first), _tensors(other)
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())[0]
        raise ValueError(f"{name} must have the tensors of {first_name}, {odd} is in one of them")
    for key, tensor in mine.items():
        check(f"shape of {key}", tuple(tensor.shape), tuple(theirs[key].shape))
        check(f"dtype of {key}", tensor.dtype, theirs[key].dtype)


def _has_adapters(encoder: TextEncoder) -> bool:
    model = getattr(encoder, "model", None)
    return hasattr(model, "peft_config") or bool(getattr(model, "_hf_peft_config_loaded", False))


def _configuration(encoder: TextEncoder) -> dict[str, Any]:
    """Return the entries of the model's config.json that say what it computes."""
    model = getattr(encoder, "model", None)
    found: dict[str, Any] = {} if model is None else model.config.to_dict()
    return {key: value for key, value in found.items() if key not in _OF_ORIGIN}


def _tensors(encoder: TextEncoder) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name, tied ones once."""
    saved = encoder.state_dict().keys()
    buffers = {name: tensor for name, tensor in encoder.named_buffers() if name in saved}
    return dict(encoder.named_parameters()) | buffers


def _list_tensors(encoders: Sequence[TextEncoder]) -> Iterator[tuple[Tensor, ...]]:
    """Yield each tensor of the first encoder with those of the others."""
    if encoders:
        by_name = [_tensors(encoder) for encoder in encoders]
        for name in by_name[0]:
            yield tuple(tensors[name] for tensors in by_name)


def _merge(tensors: Sequence[Tensor], weights: Sequence[float], method: Method) -> None:
    """Replace the values of the first tensor by the merged ones."""
    first = tensors[0]
    if not first.is_floating_point():
        if not all(torch.equal(first, other) for other in tensors[1:]):
            raise ValueError(
                f"models must have equal tensors of integers, got two of {first.dtype}"
            )
        return
    exact = [tensor.double() for tensor in tensors]
    shares = [weight / sum(weights) for weight in weights]
    if method == "slerp":
        shares = _arc_shares(exact[0], exact[1], shares[1])
    merged = sum(share * tensor for share, tensor in zip(shares, exact, strict=True))
    first.copy_(torch.as_tensor(merged))


def _arc_shares(start: Tensor, end: Tensor, t: float) -> list[float]:
    """Return the factors of two tensors for the point t of the arc between them.

    Tensors that are parallel, opposite or 0 have no arc: they are interpolated linearly.
    """
    norms = start.norm() * end.norm()
    cosine = (start * end).sum() / norms if norms > 0 else torch.ones((), dtype=start.dtype)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    if sine < _PARALLEL:
        return [1 - t, t]
    return [float(((1 - t) * angle).sin() / sine), float((t * angle).sin() / sine)]


def _save(encoder: TextEncoder, folder: os.PathLike[str]) -> None:
    save: Any = encoder  # every encoder of a folder has save_pretrained
    save.save_pretrained(folder)
