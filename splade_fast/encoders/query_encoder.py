"""load_query_encoder: the encoder of queries that a model folder holds."""

from __future__ import annotations

import os
from typing import Any

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.encoders.modules_list import is_static_embedding, read_modules
from splade_fast.encoders.pretrained import hub_arguments
from splade_fast.encoders.splade import SpladeEncoder
from splade_fast.encoders.term_weights import TermWeightEncoder, has_term_weights
from splade_fast.encoders.text_encoder import TextEncoder


def load_query_encoder(name_or_path: str | os.PathLike[str], **kwargs: Any) -> TextEncoder:
    """Load the encoder of queries that belongs to a folder, whatever its class.

    Args:
        name_or_path: a hub name or a folder.
        kwargs: arguments of transformers' `from_pretrained`, such as `dtype` or `revision`. Of
            them, a BagOfWordsQueryEncoder takes those of the hub alone and ignores the others.

    Returns:
        A BagOfWordsQueryEncoder for a folder that encodes queries by a SparseStaticEmbedding, which
        is its only module or alone in a Router's route for queries; a TermWeightEncoder for a
        folder that `TermWeightEncoder.save_pretrained` wrote and for BGE-M3; else a SpladeEncoder,
        of a Router's route for queries where there is one.

    Raises:
        ImportError, OSError, ValueError: see `from_pretrained` of these classes.

    Example::

        >>> from splade_fast.encoders.query_encoder import load_query_encoder
        >>> encoder = load_query_encoder("CHECKPOINT")
        >>> len(encoder.encode(["quick fox"], show_progress=False))
        1
    """
    name = os.fspath(name_or_path)
    hub = hub_arguments(kwargs)
    if is_static_embedding(read_modules(name, hub, "query")):
        return BagOfWordsQueryEncoder.from_pretrained(name, **hub)
    if has_term_weights(name, hub):
        return TermWeightEncoder.from_pretrained(name, **kwargs)
    return SpladeEncoder.from_pretrained(name, task="query", **kwargs)
