"""Encoding by an accelerated SparseEncoder, with vectors that stay sparse up to the result."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.util import batch_to_device, select_max_active_dims
from torch import Tensor, nn
from tqdm.auto import tqdm

from splade_fast._checks import check_unicode
from splade_fast.encoders.threads import submodules
from splade_fast.integrations.sentence_transformers.batches import batches
from splade_fast.integrations.sentence_transformers.modules import SPARSE, HeadPooling
from splade_fast.integrations.sentence_transformers.swapping import Role
from splade_fast.ops.sparse_rows import SparseRows

_LOGGER = logging.getLogger("sentence_transformers.sparse_encoder.model")


class _Encoder(Role):
    """Encoding of texts, shared by all versions of sentence-transformers.

    The methods use the attributes of the SparseEncoder whose class they extend.
    """

    def _encode_texts(
        self,
        texts: Sequence[Any],
        *,
        device: Any,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        convert_to_sparse_tensor: bool,
        save_to_cpu: bool,
        max_active_dims: int | None,
        **kwargs: Any,
    ) -> Tensor:
        """Encode texts to vectors (N, V), in the order of the texts.

        Raises:
            ValueError: max_active_dims is less than 1, or a text holds a lone surrogate.
        """
        model: Any = self
        for position, text in enumerate(texts):
            if isinstance(text, str):
                check_unicode(f"inputs[{position}]", text)
        if max_active_dims is not None and max_active_dims < 1:
            raise ValueError(f"max_active_dims must be a positive integer, got {max_active_dims}")
        batch_size = operator.index(batch_size)  # torch takes no counts of numpy
        modules = submodules(model)
        if any(module.training for module in modules):
            model.eval()
        options = kwargs | ({"max_active_dims": max_active_dims} if max_active_dims else {})
        should_return_rows = (convert_to_sparse_tensor or max_active_dims) and _pools_last(
            model, modules
        )
        result: _Coordinates | _Matrix = _Coordinates() if convert_to_sparse_tensor else _Matrix()
        order: list[Tensor] = []
        all_batches = batches(model, modules, texts, batch_size, prompt, kwargs)
        if show_progress_bar:  # a disabled bar starts a thread all the same
            all_batches = _with_progress(all_batches, len(texts))
        for places, features in all_batches:
            order.append(places)
            features = batch_to_device(features, device)
            if should_return_rows:
                features[SPARSE] = max_active_dims
            with torch.inference_mode():
                vectors = model(features, **options)["sentence_embedding"]
                if max_active_dims is not None and isinstance(vectors, Tensor):
                    vectors = select_max_active_dims(vectors, max_active_dims=max_active_dims)
                place = torch.device("cpu") if save_to_cpu else vectors.device
                result.add(vectors.to(place))
        return result.restore_order(torch.cat(order))


class _WithInference(_Encoder):
    """Encoder for sentence-transformers 6, where `encode`, pools and ranks call `_inference`."""

    def _inference(self, inputs: list[Any], *, device: Any = None, **options: Any) -> Tensor:
        model: Any = self
        if not inputs:
            nothing: Tensor = self._original._inference(self, inputs, device=device, **options)
            return nothing
        if device is not None or not _is_on_one_device(model):
            device = model._resolve_inference_device(device)
        return self._encode_texts(inputs, device=device or model.device, **options)


class _WithEncode(_Encoder):
    """Encoder for sentence-transformers 5.4, where pools call `encode` in their processes."""

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = True,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        device: Any = None,
        max_active_dims: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        model: Any = self
        is_single = model.is_singular_input(inputs)
        texts = [inputs] if is_single else list(inputs)
        known = {"task", *model.get_model_kwargs()}
        if (
            not texts
            or batch_size < 1
            or pool
            or isinstance(device, list)
            or not known >= {*kwargs}
        ):
            # The original raises the error, or sends chunks to processes that call this method.
            return self._original.encode(
                self,
                inputs,
                prompt_name=prompt_name,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
                convert_to_tensor=convert_to_tensor,
                convert_to_sparse_tensor=convert_to_sparse_tensor,
                save_to_cpu=save_to_cpu,
                device=device,
                max_active_dims=max_active_dims,
                pool=pool,
                chunk_size=chunk_size,
                **kwargs,
            )
        if show_progress_bar is None:
            show_progress_bar = _LOGGER.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        device = device or model.device
        model.to(device)
        vectors = self._encode_texts(
            texts,
            device=device,
            prompt=model._resolve_prompt(prompt, prompt_name),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            convert_to_sparse_tensor=convert_to_sparse_tensor,
            save_to_cpu=save_to_cpu,
            max_active_dims=model.max_active_dims if max_active_dims is None else max_active_dims,
            **kwargs,
        )
        if is_single:
            return vectors[0]
        return vectors if convert_to_tensor else list(vectors)


SparseRowsEncoder: type[Role] = (
    _WithInference if hasattr(SparseEncoder, "_inference") else _WithEncode
)


class _Coordinates:
    """Collector of batches of vectors into one sparse COO tensor."""

    def __init__(self) -> None:
        self._lengths: list[Tensor] = []
        self._columns: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_cols = 0

    def add(self, vectors: Tensor | SparseRows) -> None:
        self._num_cols = vectors.shape[1]
        if isinstance(vectors, SparseRows):
            lengths = vectors.lengths
            _, columns, values = vectors.coordinates()
        else:
            sparse = vectors.to_sparse()
            (rows, columns), values = sparse.indices(), sparse.values()
            lengths = torch.bincount(rows, minlength=len(vectors))
        self._lengths.append(lengths.long())
        self._columns.append(columns.int())
        self._values.append(values)

    def restore_order(self, order: Tensor) -> Tensor:
        """Return the vectors in the order of the texts, which `order` sorted."""
        lengths = torch.cat(self._lengths)
        device = lengths.device
        order = order.to(device)
        sorted_back = torch.empty_like(lengths)
        sorted_back[order] = lengths
        ends = sorted_back.cumsum(0)
        starts = (ends - sorted_back)[order]  # position of each vector's first entry in the result
        count = int(ends[-1])
        indices = torch.empty(2, count, dtype=torch.int64, device=device)
        indices[0] = torch.repeat_interleave(sorted_back)
        values = self._values[0].new_empty(count)
        first = 0
        for columns, weights, mine in zip(self._columns, self._values, self._lengths, strict=True):
            begins = starts[first : first + len(mine)] - (mine.cumsum(0) - mine)
            places = torch.arange(len(columns), device=device) + begins.repeat_interleave(mine)
            indices[1, places] = columns.long()
            values[places] = weights
            first += len(mine)
        return torch.sparse_coo_tensor(
            indices,
            values,
            (len(lengths), self._num_cols),
            check_invariants=False,
            is_coalesced=True,
        )


class _Matrix:
    """Collector of batches of vectors into one dense tensor."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, vectors: Tensor | SparseRows) -> None:
        self._batches.append(vectors.to_dense() if isinstance(vectors, SparseRows) else vectors)

    def restore_order(self, order: Tensor) -> Tensor:
        """Return the vectors in the order of the texts, which `order` sorted."""
        first = self._batches[0]
        result = first.new_empty(len(order), first.shape[1])
        sizes = [len(batch) for batch in self._batches]
        for places in order.to(first.device).split(sizes):
            result[places] = self._batches.pop(0)
        return result


def _with_progress(
    all_batches: Iterator[tuple[Tensor, dict[str, Any]]], count: int
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield the batches, and show how many of `count` texts have been encoded."""
    with tqdm(total=count, desc="Texts") as bar:
        for places, features in all_batches:
            yield places, features
            bar.update(len(places))


def _is_on_one_device(model: Any) -> bool:
    """Return whether all tensors are on one device that no device map or hook chose.

    Then `_resolve_inference_device` has nothing to do, for which it walks the model several times.
    """
    if getattr(model, "_placement_is_delegated", False):
        return False
    devices = {
        tensor.device
        for module in submodules(model)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    return len(devices) == 1


def _pools_last(model: nn.Sequential, modules: Sequence[nn.Module]) -> bool:
    """Return whether the vectors of every HeadPooling of `modules` are the output of the model."""
    last = _last_modules(list(model))
    return all(module in last for module in modules if isinstance(module, HeadPooling))


def _last_modules(modules: list[nn.Module]) -> list[nn.Module]:
    last = modules[-1]
    if not isinstance(last, Router):
        return [last]
    return [module for route in _routes(last) for module in _last_modules(route)]


def _routes(router: Any) -> list[list[nn.Module]]:
    return [list(route) for route in router.sub_modules.values()]
