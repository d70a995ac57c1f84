"""Tuning -> the arguments of PEFT's and bitsandbytes' configurations. Pure.

`models/` makes the objects of them, `trl.py` and `nexa plan` show them.
"""

from __future__ import annotations

from typing import Any

from nexa_train.config.spec import LoraTuning, QloraTuning


def lora_arguments(tuning: LoraTuning | QloraTuning) -> dict[str, Any]:
    """Of `peft.LoraConfig`. `all-linear` is PEFT's word for all linear layers but the head."""
    return {
        "r": tuning.rank,
        "lora_alpha": tuning.resolved_alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": list(tuning.target_modules) or "all-linear",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def quantization_arguments(tuning: QloraTuning, *, precision: str) -> dict[str, Any]:
    """Of `transformers.BitsAndBytesConfig`: 4-bit NormalFloat (QLoRA, Dettmers et al. 2023)."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": tuning.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16" if precision == "bf16" else "float32",
    }
