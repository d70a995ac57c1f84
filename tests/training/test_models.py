"""What is said of a model's sizes is what transformers builds."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.training

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_parameters_of_a_config_are_those_that_are_built(kind: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nexa_train.models.locate import sizes_of

    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    said = sizes_of(json.loads(config.to_json_string()))
    assert said is not None
    assert said.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert said.num_linear_parameters == sum(layer.weight.numel() for layer in linear) - 32 * 64
