"""Model folder or sizes -> a transformers module in float32, with adapters if asked. The only builder.

Comes after `locate.py`; the backends call it. The same seed gives the same fresh weights on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from nexa_train.config.spec import JobSpec, LoraTuning, QloraTuning
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import ConfigError
from nexa_train.models.attention import EXPLICIT, FUSED
from nexa_train.models.locate import Located
from nexa_train.registry import Architecture

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = {"auto": "sdpa", "eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
"""transformers' names for `model.attn`, where another library's trainer makes the batches."""

ROW_ATTENTION = {"auto": FUSED, "eager": EXPLICIT, "sdpa": FUSED, "flash": FUSED}
"""Ours, where microbatches are rows of samples."""


def build_model(spec: JobSpec, located: Located, tokenizer: ChatTokenizer) -> PreTrainedModel:
    """The base model, without adapters; `locate.check_model` has found it fit."""
    torch.manual_seed(spec.training.seed)
    attention = (ROW_ATTENTION if _takes_rows(spec) else ATTENTION)[spec.model.attn]
    if located.scratch is not None:
        config = _llama_config(located.scratch, spec.model.max_seq_len, tokenizer)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            located.folder,
            attn_implementation=attention,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=_quantization(spec),
        )
    model.config.use_cache = False
    keep_trainable(model)
    return model


def _takes_rows(spec: JobSpec) -> bool:
    """Whether a microbatch is one row of samples: with our loss, and with TRL's for sft, which only reads labels."""
    return spec.backend in ("fsdp", "deepspeed") or (spec.backend == "hf" and spec.method.type == "sft")


def build_reference(spec: JobSpec, located: Located, tokenizer: ChatTokenizer) -> PreTrainedModel | None:
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
    names = sorted(name for name in _linear_layers(model) if not name.endswith("lm_head"))
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if missing := [target for target in tuning.target_modules if target not in leaves]:
        raise ConfigError(
            f"tuning.target_modules: {', '.join(missing)} match no linear layer; this model has {', '.join(leaves)}"
        )
    from peft import LoraConfig  # noqa: PLC0415 - seconds to import, and full tuning does without

    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.scale * tuning.rank,
        lora_dropout=tuning.dropout,
        target_modules=list(tuning.target_modules) or leaves,
        bias="none",
        task_type="CAUSAL_LM",
    )


def inject_adapters(config: LoraConfig, model: PreTrainedModel) -> None:
    """Put the adapters into the model in place, fresh from the current random state; all else is frozen."""
    from peft import inject_adapter_in_model  # noqa: PLC0415 - see lora_config

    inject_adapter_in_model(config, model)


def _linear_layers(model: nn.Module) -> list[str]:
    # bitsandbytes' 4-bit layer is a subclass of Linear, so this finds both.
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _llama_config(sizes: Architecture, max_seq_len: int, tokenizer: ChatTokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=max_seq_len,
        tie_word_embeddings=sizes.tied_head,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None,
    )


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
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.tuning.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if spec.training.precision == "bf16" else torch.float32,
    )
