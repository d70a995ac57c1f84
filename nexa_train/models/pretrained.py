"""Models of every kind, as transformers has them: for its Trainer, and where `decoder.py` does not know the kind.

Used by `build.py` alone, which imports it only then: transformers takes seconds to import.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from nexa_train.backend_config.adapters import quantization_arguments
from nexa_train.config.spec import JobSpec, QloraTuning
from nexa_train.errors import ConfigError
from nexa_train.models.attention import NO_SOFT_CAP, Kind, row_attention
from nexa_train.models.build import NATIVE
from nexa_train.models.decoder import Decoder, missing_weights
from nexa_train.models.locate import read_model_config

ATTENTION = {"auto": "sdpa", "eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
"""transformers' names for `model.attn`, where another library's trainer makes the batches."""

ROW_ATTENTION: dict[Kind, str] = {kind: f"nexa-{kind}" for kind in get_args(Kind)}
"""Ours, where microbatches are rows of samples."""

for _kind, _name in ROW_ATTENTION.items():
    AttentionInterface.register(_name, partial(row_attention, kind=_kind))


def quieten() -> None:
    """Their bars and advice would land in the middle of ours."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_pretrained(spec: JobSpec, folder: Path) -> PreTrainedModel:
    """The model of a folder, in float32 or quantised.

    Raises:
        ConfigError: the folder lacks weights, or its scores cannot be had by `model.attn`; see `check_flash`, too.
    """
    quieten()
    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=able_attention(_attention(spec), spec, folder),
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=_quantization(spec),
        output_loading_info=True,
    )
    # transformers draws what is missing at random, and tells of it in a warning.
    if told["missing_keys"]:
        raise ConfigError(missing_weights(folder, sorted(told["missing_keys"])))
    return _trainable(model)


def like(decoder: Decoder, spec: JobSpec) -> PreTrainedModel:
    """transformers' llama with the weights of a decoder that was built from scratch."""
    quieten()
    config = LlamaConfig(**decoder.config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=_attention(spec), dtype=torch.float32)
    model.load_state_dict(decoder.state_dict())
    return _trainable(model)


def check_flash(spec: JobSpec) -> None:
    """Whether there is the package by which transformers' own models do flash attention; ours do it by torch's.

    Raises:
        ConfigError: the job asks for it, and there is none that this torch can use.
    """
    if spec.model.attn == "flash" and not _takes_rows(spec) and not is_flash_attn_2_available():
        raise ConfigError(
            f"model.attn: flash on backend {spec.backend} with method {spec.method.type} needs the package flash-attn "
            "(2.3.3 or later) and a GPU, and this environment lacks one of them; use auto, sdpa or eager"
        )


def _attention(spec: JobSpec) -> str:
    check_flash(spec)
    return (ROW_ATTENTION if _takes_rows(spec) else ATTENTION)[spec.model.attn]


def able_attention(named: str, spec: JobSpec, folder: Path) -> str:
    """transformers' name of an attention that the model can have: Gemma 2, whose scores are bent, not its sdpa.

    Raises:
        ConfigError: the job asks for that one.
    """
    if named != "sdpa" or read_model_config(folder / "config.json").get("attn_logit_softcapping") is None:
        return named
    if spec.model.attn == "sdpa":
        raise ConfigError(NO_SOFT_CAP)
    return "eager"


def _takes_rows(spec: JobSpec) -> bool:
    """Whether a microbatch is one row of samples: with our loss, and with TRL's for sft, which only reads labels."""
    return spec.backend in NATIVE or (spec.backend == "hf" and spec.method.type == "sft")


def _trainable(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False
    keep_trainable(model)
    return model


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference the first time the model is validated.

    On processors with AVX512-BF16 it does so, and the packed product has no backward pass: training would go
    on without gradients to what lies below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization(spec: JobSpec) -> Any:
    if not isinstance(spec.tuning, QloraTuning):
        return None
    return BitsAndBytesConfig(**quantization_arguments(spec.tuning, precision=spec.training.precision))
