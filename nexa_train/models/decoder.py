"""A llama-shaped decoder in plain torch: Llama, Falcon 3, SmolLM2, Mistral, Qwen 2.5 and 3.

What the native backends train where `decoder_config` knows the kind; others are transformers' (`build.py`). Names of
modules and weights are transformers', and it answers to the part of a `PreTrainedModel` that Nexa uses, so that files,
adapters and checkpoints are the same for both. It loads without transformers, which takes seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexa_train.errors import ConfigError
from nexa_train.models.attention import Kind, Rows, attend
from nexa_train.models.decoder_config import INITIAL_DEVIATION, DecoderConfig
from nexa_train.models.fused import rms_norm, rotate, swiglu
from nexa_train.models.weight_files import weight_files

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of each token's rotation: float32 [tokens, 1, head_dim / 2]."""


class Linear(nn.Linear):
    """Its weights come later: torch would draw them once for nothing."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """As `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Norm(nn.Module):
    """See `fused.rms_norm`."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        """See `fused.rms_norm`."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) over rows of samples."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.d_model, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config.head_dim, config.eps), Norm(config.head_dim, config.eps)

    def forward(self, hidden: Tensor, angles: Angles, rows: Rows) -> Tensor:
        """float [tokens, d_model] to the same."""
        heads = (len(hidden), -1, self.config.head_dim)
        query, key = self.q_proj(hidden).view(heads), self.k_proj(hidden).view(heads)
        value = self.v_proj(hidden).view(heads)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        found = attend(
            rotate(query, *angles),
            rotate(key, *angles),
            value,
            rows,
            scaling=self.config.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            window=self.config.window,
        )
        mixed: Tensor = self.o_proj(found.flatten(1))
        return mixed


class FeedForward(nn.Module):
    """See `fused.swiglu`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """float [tokens, d_model] to the same."""
        mixed: Tensor = self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))
        return mixed


class Layer(nn.Module):
    """Attention and feed-forward, each of what is normalised and added to what was (pre-norm)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        self.input_layernorm = Norm(config.d_model, config.eps)
        self.post_attention_layernorm = Norm(config.d_model, config.eps)

    def forward(self, hidden: Tensor, angles: Angles, rows: Rows) -> Tensor:
        """float [tokens, d_model] to the same."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles, rows)
        found: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return found


class Decoded(NamedTuple):
    """float [batch, length, d_model]."""

    last_hidden_state: Tensor


class Body(nn.Module):
    """All of the decoder but its head."""

    def __init__(self, config: DecoderConfig, *, attention: Kind) -> None:
        super().__init__()
        self.config, self.attention, self.recompute = config, attention, False
        self.embed_tokens = Embedding(config.vocab_size, config.d_model, config.padding)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = Norm(config.d_model, config.eps)

    def forward(
        self, *, input_ids: Tensor, position_ids: Tensor, edges: Tensor, lengths: tuple[int, ...], use_cache: bool
    ) -> Decoded:
        """See `losses.hidden_states`; `use_cache` is there for transformers' models.

        Args:
            edges, lengths: see `attention.Rows`.
        """
        del use_cache
        hidden: Tensor = self.embed_tokens(input_ids.flatten())
        rows, angles = Rows(edges, lengths, self.attention), self._angles(position_ids.flatten())
        for layer in self.layers:
            if self.recompute and self.training:
                hidden = checkpoint(layer, hidden, angles, rows, use_reentrant=False)
            else:
                hidden = layer(hidden, angles, rows)
        return Decoded(self.norm(hidden).view(*input_ids.shape, -1))

    @torch.no_grad()
    def _angles(self, positions: Tensor) -> Angles:
        turns = frequencies(self.config.rope, self.config.head_dim).to(positions.device)
        angles = positions[:, None, None].float() * turns
        return angles.cos(), angles.sin()


class Decoder(nn.Module):
    """A causal language model whose logits are the head's product; nothing here makes them (`losses.py`)."""

    def __init__(self, config: DecoderConfig, *, attention: Kind = "auto") -> None:
        """On the CPU in float32, with weights that `draw_weights` or `load_weights` must set.

        Args:
            attention: how its scores are made.
        """
        super().__init__()
        self.config, self.model = config, Body(config, attention=attention)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> Body:
        """All but the head."""
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def activation_checkpointing_enable(self, _: Mapping[str, Any]) -> None:
        """Make each layer's activations again in the backward pass (Chen et al. 2016)."""
        self.model.recompute = True


@torch.no_grad()
def draw_weights(decoder: Decoder, seed: int) -> None:
    """Fresh weights, the same for one seed: normal products, no biases, norms that do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, INITIAL_DEVIATION, generator=generator)


@torch.no_grad()
def load_weights(decoder: Decoder, folder: Path) -> None:
    """Set all weights from a model folder's safetensors files, whatever floats they are in.

    Raises:
        ConfigError: a weight is missing, or has another shape than config.json says; a head that config.json ties to
            the embedding is another; see `weight_files`, too.
    """
    wanted, tied = dict(decoder.named_parameters()), None
    for path, names in weight_files(folder).items():
        with safe_open(path, framework="pt") as file:
            there = set(file.keys()) if names is None else names & set(file.keys())
            for name in sorted(wanted.keys() & there):
                _set(wanted.pop(name), file.get_tensor(name), name, path)
            if decoder.config.tied_head and _HEAD in there:
                tied = file.get_tensor(_HEAD)
    if tied is not None:
        _set_tied(decoder, tied, wanted.pop(_EMBEDDING, None), folder)
    if wanted:
        raise ConfigError(missing_weights(folder, wanted))


def _set(parameter: Tensor, found: Tensor, name: str, where: Path) -> None:
    if found.shape != parameter.shape:
        raise ConfigError(
            f"model.name: {where}: {name} is {list(found.shape)}, by its config.json {list(parameter.shape)}"
        )
    parameter.copy_(found)


def _set_tied(decoder: Decoder, head: Tensor, unset: Tensor | None, folder: Path) -> None:
    """The head of a folder that says that it is the embedding: it may be all that there is of both, and may be another.

    Args:
        unset: the embedding, where the folder has none.
    """
    if unset is not None:
        _set(unset, head, _HEAD, folder)
    elif not torch.equal(decoder.lm_head.weight, head.to(decoder.lm_head.weight.dtype)):
        raise ConfigError(
            f"model.name: {folder}: config.json ties the head to the embedding, and {_HEAD} is another matrix; "
            "set tie_word_embeddings to false there"
        )


def missing_weights(folder: Path, names: Mapping[str, Any] | list[str]) -> str:
    """What is said of a folder that lacks weights; they would be trained from noise."""
    shown = ", ".join(sorted(names)[:3])
    return f"model.name: {folder} lacks {len(names)} weights that its config.json asks for, such as {shown}"


def frequencies(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Radians a token by which each pair of channels turns: float32 [head_dim / 2].

    `llama3` slows the long waves down (Grattafiori et al. 2024, The Llama 3 Herd of Models, section 3.4.2, as its
    authors published it in code): whole beyond the original context, not at all well within it, blended between.
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    turns = torch.pow(rope["rope_theta"], powers).reciprocal()
    if rope["rope_type"] == "default":
        return turns
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    waves = 2 * math.pi / turns
    kept = ((context / waves - low) / (high - low)).clamp(0.0, 1.0)
    slowed: Tensor = turns * kept + turns / rope["factor"] * (1.0 - kept)
    return slowed
