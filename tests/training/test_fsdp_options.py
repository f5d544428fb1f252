"""Options that FSDP2 cannot have are refused before a step."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
from splade_fast.training import ObjectiveArguments, SpladeTrainingArguments, TrainingModel
from splade_fast.training.fsdp import prepare_plugin
from tests.training.models import FAMILIES, encoder_of


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"fsdp_version": 1}, {}, "version in fsdp_config must be 2, got 1"),
        ({"activation_checkpointing": True}, {}, "activation_checkpointing in fsdp_config must be"),
        ({"cpu_offload": True}, {}, "cpu_offload in fsdp_config must be false"),
        (
            {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 9},
            {},
            "auto_wrap_policy in fsdp_config must be TRANSFORMER_BASED_WRAP",
        ),
        (
            {"transformer_cls_names_to_wrap": ["LlamaLayer"]},
            {},
            "must name classes of modules of the model, got LlamaLayer",
        ),
        (
            {"transformer_cls_names_to_wrap": ["BertEmbeddings"]},
            {},
            "share no weight with others, such as BertLayer, got BertEmbeddings",
        ),
        ({}, {"fp16": True}, "fp16 must be False with fsdp; use bf16, got True"),
        ({}, {"bf16_full_eval": True}, "bf16_full_eval must be False with fsdp, got True"),
        ({}, {"torch_compile": True}, "torch_compile must be False with fsdp, got True"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size must be False with fsdp"),
        ({}, {"optim": "adafactor"}, "optim must be one of adamw_torch, .* got adafactor"),
    ],
)
def test_refused_options(options, arguments, message, tmp_path):
    args = SpladeTrainingArguments(output_dir=str(tmp_path), report_to="none")
    for name, value in arguments.items():
        setattr(args, name, value)  # some of them raise on a CPU
    plugin = FullyShardedDataParallelPlugin(**({"fsdp_version": 2} | options))
    model = TrainingModel(encoder_of(), ObjectiveArguments())
    with pytest.raises(ValueError, match=message):
        prepare_plugin(plugin, args, model)


def test_weights_of_two_dtypes_are_refused(tmp_path):
    args = SpladeTrainingArguments(output_dir=str(tmp_path), report_to="none")
    encoder = encoder_of(dtype=torch.bfloat16)
    queries = BagOfWordsQueryEncoder(encoder.tokenizer, torch.ones(encoder.vocab_size))
    model = TrainingModel(encoder, ObjectiveArguments(), query_encoder=queries)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ValueError, match=r"one dtype with fsdp, got torch.bfloat16 and .*float32"):
        prepare_plugin(plugin, args, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_are_gathered_alone(family, tmp_path):
    args = SpladeTrainingArguments(output_dir=str(tmp_path), report_to="none")
    encoder = encoder_of(family)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    prepare_plugin(plugin, args, TrainingModel(encoder, ObjectiveArguments()))
    layer, outer = plugin.transformer_cls_names_to_wrap
    assert outer == "SpladeEncoder"
    found = [part for part in encoder.modules() if type(part).__name__ == layer]
    assert len(found) == encoder.model.config.num_hidden_layers


def test_loading_on_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading must be false with fsdp"):
        SpladeTrainingArguments(output_dir=str(tmp_path), report_to="none")
