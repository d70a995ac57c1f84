"""config.json of a model folder -> the sizes of a `decoder.Decoder`, or the word that it is another kind. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexa_train.registry import Architecture

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the models that differ by their biases, norms of heads and window alone."""

INITIAL_DEVIATION = 0.02
"""Standard deviation of fresh weights, as transformers has it for these models."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a decoder is built from.

    Attributes:
        source: config.json as it was, which goes with the trained weights again.
        qkv_bias, o_bias, mlp_bias: whether those layers have biases. qk_norm: whether each head's queries and keys are
            normalised. window: tokens that one sees, with itself; None: all before it.
        padding: id whose embedding learns nothing as an input. rope: `rope_theta`, and `rope_type` with its keys.
    """

    source: Mapping[str, Any]
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    tied_head: bool
    rope: Mapping[str, Any]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    attention_dropout: float = 0.0
    padding: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As PEFT looks at it."""
        return dict(self.source)

    def to_json_string(self, **_: Any) -> str:
        """config.json of these weights, as transformers reads it: whole numbers in float32, and not quantised."""
        return json.dumps({**self.source, "dtype": "float32"}, indent=2, sort_keys=True) + "\n"


def read_config(config: Mapping[str, Any]) -> DecoderConfig | None:
    """None where the model is of another kind, or does not say all that decides what it computes."""
    kind, rope = config.get("model_type"), _rope(config)
    if kind not in KINDS or rope is None or config.get("hidden_act") != "silu" or _is_special(config):
        return None
    try:
        d_model, heads = config["hidden_size"], config["num_attention_heads"]
        attention_bias = kind == "qwen2" or (kind != "mistral" and bool(config.get("attention_bias", False)))
        return DecoderConfig(
            source=config,
            vocab_size=config["vocab_size"],
            d_model=d_model,
            d_ff=config["intermediate_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"] if kind == "qwen3" else config.get("head_dim") or d_model // heads,
            eps=config["rms_norm_eps"],
            tied_head=config["tie_word_embeddings"],
            rope=rope,
            qkv_bias=attention_bias,
            o_bias=attention_bias and kind != "qwen2",
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            window=config["sliding_window"] if kind == "mistral" else None,
            attention_dropout=config.get("attention_dropout") or 0.0,
            padding=config.get("pad_token_id"),
        )
    except KeyError:
        return None


def scratch_config(sizes: Architecture, max_seq_len: int, *, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """config.json of a llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.d_model,
        "initializer_range": INITIAL_DEVIATION,
        "intermediate_size": sizes.d_ff,
        "max_position_embeddings": max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": sizes.n_heads,
        "num_hidden_layers": sizes.n_layers,
        "num_key_value_heads": sizes.n_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": sizes.tied_head,
        "vocab_size": sizes.vocab_size,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """In one spelling; transformers 4 wrote `rope_theta` beside `rope_scaling`. None: of a kind not known here."""
    found = config.get("rope_parameters")
    if found is None:
        scaling = config.get("rope_scaling") or {}
        if "rope_theta" not in config:
            return None
        found = {**scaling, "rope_theta": config["rope_theta"]}
        found["rope_type"] = found.pop("type", None) or found.get("rope_type") or "default"
    known = found.get("rope_type") in ("default", "llama3") and found.get("partial_rotary_factor", 1.0) == 1.0
    return found if known and "rope_theta" in found else None


def _is_special(config: Mapping[str, Any]) -> bool:
    """Whether some layers see less than others, weights are quantised, or the head is not a language model's."""
    windows = config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}
    headed = all(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
    return bool(windows and config["model_type"] != "mistral") or "quantization_config" in config or not headed
