"""Tiny random checkpoints with a word-level tokenizer, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

_SENTENCE = "a quick brown fox jumps over the lazy dog and sleeps under an old tree"
WORDS = _SENTENCE.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = len(SPECIAL) + len(WORDS)

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
_SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 3}


def masked_lm_configs() -> dict[str, PreTrainedConfig]:
    return {
        "bert": BertConfig(**_SIZES),
        "roberta": RobertaConfig(**_SIZES, **_SPECIAL_IDS),
        "xlm-roberta": XLMRobertaConfig(**_SIZES, **_SPECIAL_IDS),
        "electra": ElectraConfig(**_SIZES, embedding_size=8),
        "modernbert": ModernBertConfig(
            **_SIZES, **_SPECIAL_IDS, cls_token_id=2, sep_token_id=3, local_attention=8
        ),
        "distilbert": DistilBertConfig(
            vocab_size=VOCAB_SIZE,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=64,
            initializer_range=0.5,
        ),
        "deberta": DebertaConfig(
            **_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
        ),
        "deberta-v3": DebertaV2Config(  # as the published v3 checkpoints are configured
            **_SIZES,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
    }


def causal_lm_configs() -> dict[str, PreTrainedConfig]:
    sizes = {**_SIZES, **_SPECIAL_IDS, "num_key_value_heads": 1}
    return {
        "llama": LlamaConfig(**sizes),
        "qwen2": Qwen2Config(**sizes, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**sizes, head_dim=8),
        "mistral": MistralConfig(**sizes, sliding_window=4),
    }


def gemma_configs() -> dict[str, PreTrainedConfig]:
    """Families of Gemma without softcapping of the logits."""
    sizes = {**_SIZES, **_SPECIAL_IDS, "num_key_value_heads": 1, "head_dim": 8}
    sizes["query_pre_attn_scalar"] = 8
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "gemma": GemmaConfig(**sizes),
        # transformers' softmax of Gemma 2 is NaN in float64 where padding sees no text.
        "gemma2": Gemma2Config(
            **sizes, **windows | {"sliding_window": 64}, final_logit_softcapping=None
        ),
        "gemma3": Gemma3TextConfig(**sizes, **windows),
    }


def softcapped_config() -> PreTrainedConfig:
    """A family that changes its logits after the decoder."""
    return Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0)


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    masked = type(config).__name__ in {type(c).__name__ for c in masked_lm_configs().values()}
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
    decoder = model.get_output_embeddings()
    with torch.no_grad():
        decoder.weight[0].normal_()  # zeros for padding would give the same logit at all positions
        if decoder.bias is not None:  # zeros would hide mistakes
            decoder.bias.normal_()
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def tied_weights(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def save_checkpoint(config: PreTrainedConfig, folder: Path) -> Path:
    make_model(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
