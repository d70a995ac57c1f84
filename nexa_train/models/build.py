"""Model folder or sizes -> a model in float32, with adapters if asked. The only builder.

Comes after `locate.py`; the backends call it. The same seed gives the same fresh weights on every rank and backend.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Union

import torch
from torch import nn

from nexa_train.backend_config.adapters import lora_arguments
from nexa_train.config.spec import JobSpec, LoraTuning, QloraTuning
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import ConfigError
from nexa_train.models.decoder import Decoder, draw_weights, load_weights
from nexa_train.models.decoder_config import read_config, scratch_config
from nexa_train.models.locate import Located, read_model_config
from nexa_train.registry import Architecture

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

Causal = Union["Decoder", "PreTrainedModel"]
"""A causal language model: `decoder.py` answers to all that is asked of either."""

NATIVE = ("fsdp", "deepspeed")
"""Backends whose loop takes models of our own."""


def build_model(spec: JobSpec, located: Located, tokenizer: ChatTokenizer) -> Causal:
    """The base model, without adapters; `locate.check_model` has found it fit.

    Raises:
        ConfigError: weights are missing, or not as config.json says.
    """
    model = _scratch(spec, located.scratch, tokenizer) if located.scratch is not None else _stored(spec, located.folder)
    # So that adapters, which are drawn next, are the same on every backend.
    torch.manual_seed(spec.training.seed)
    return model


def _scratch(spec: JobSpec, sizes: Architecture, tokenizer: ChatTokenizer) -> Causal:
    length, ids = spec.model.max_seq_len, {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    config = read_config(scratch_config(sizes, length, **ids))
    assert config is not None  # noqa: S101 - it is a llama
    decoder = Decoder(config, attention=spec.model.attn)
    draw_weights(decoder, spec.training.seed)
    return decoder if spec.backend in NATIVE else _pretrained().like(decoder, spec)


def _stored(spec: JobSpec, folder: Path) -> Causal:
    config = read_config(read_model_config(folder / "config.json"))
    if config is None or spec.backend not in NATIVE:
        return _pretrained().load_pretrained(spec, folder)
    decoder = Decoder(config, attention=spec.model.attn)
    load_weights(decoder, folder)
    return decoder


def _pretrained() -> ModuleType:
    from nexa_train.models import pretrained  # noqa: PLC0415 - transformers takes seconds to import

    return pretrained


def build_reference(spec: JobSpec, located: Located, tokenizer: ChatTokenizer) -> Causal | None:
    """What method dpo compares with: the base model, built once more and frozen, whatever a checkpoint holds.

    None where it is not needed: another method, or adapters, without which the trained model is the base.
    """
    if spec.method.type != "dpo" or spec.tuning.type != "full":
        return None
    return build_model(spec, located, tokenizer).eval().requires_grad_(False)


def lora_config(tuning: LoraTuning | QloraTuning, model: nn.Module) -> LoraConfig:
    """PEFT's configuration of the adapters.

    Raises:
        ConfigError: a target matches no linear layer.
    """
    leaves = check_targets(tuning, model)
    from peft import LoraConfig  # noqa: PLC0415 - seconds to import, and full tuning does without

    # Names in place of PEFT's word, which it understands of transformers' models alone.
    return LoraConfig(**lora_arguments(tuning) | {"target_modules": list(tuning.target_modules) or leaves})


def check_targets(tuning: LoraTuning | QloraTuning, model: nn.Module) -> list[str]:
    """What the linear layers but the head are called, sorted; of a model that has its adapters already, too.

    Raises:
        ConfigError: adapters are asked for where there is no such layer; names those that are.
    """
    linear = (name.removesuffix(".base_layer") for name in _linear_layers(model) if ".lora_" not in name)
    there = sorted({name.rpartition(".")[2] for name in linear if not name.endswith("lm_head")})
    if missing := [target for target in tuning.target_modules if target not in there]:
        raise ConfigError(
            f"tuning.target_modules: {', '.join(missing)} match no linear layer; this model has {', '.join(there)}"
        )
    return there


def inject_adapters(config: LoraConfig, model: Causal) -> None:
    """Put the adapters into the model in place, fresh from the current random state; all else is frozen."""
    from peft import inject_adapter_in_model  # noqa: PLC0415 - see lora_config

    inject_adapter_in_model(config, model)


def _linear_layers(model: nn.Module) -> list[str]:
    # bitsandbytes' 4-bit layer is a subclass of Linear, so this finds both.
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
