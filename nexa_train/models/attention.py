"""Attention over samples that lie one after another, each seeing itself alone. Used by the native backends' models.

A microbatch is then one row without padding, and all but attention runs on real tokens only; packed or not costs
the same. `decoder.py` calls it; `build.py` registers it with transformers, whose models call it with what `losses.py`
hands through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexa_train.errors import ConfigError

Kind: TypeAlias = Literal["auto", "eager", "sdpa", "flash"]
"""`model.attn`: the fastest that can be had; the formula step by step; torch's fused kernels, sample by sample; its
flash attention, all samples at once."""

FLASH_HEAD = 256
"""Channels of a head that torch's flash attention takes at most."""

FLASH_CAPABILITY = (8, 0)
"""Of the GPUs that it runs on, at least: Ampere."""

NO_SOFT_CAP = "model.attn: sdpa takes no scores with a soft cap, as this model's are; use auto or eager"


def sample_edges(position_ids: Tensor) -> Tensor:
    """Where samples begin, and the end of the last: int32 [samples + 1].

    Args:
        position_ids: int64 [batch, length], 0 where a sample begins, which is so at the start of every row.
    """
    flat = position_ids.flatten()
    begins = (flat == 0).nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([len(flat)])]).int()


@dataclass(frozen=True)
class Rows:
    """How tokens in a row are shared out to samples, and how their scores are made.

    Attributes:
        edges: int32 [samples + 1] into the flattened tokens. lengths: the same as differences, on the host.
    """

    edges: Tensor
    lengths: tuple[int, ...]
    kind: Kind


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each sample alone; float [tokens, heads, head_dim].

    Args:
        query: float [tokens, heads, head_dim]. key, value: the same with kv_heads, which divide heads.
        window: tokens that one sees, with itself. softcap: scores are bent by its tanh (Gemma 2), which none of torch's
            kernels knows.

    Raises:
        ConfigError: the kernel that was asked for cannot be had.
    """
    parts = [part.to(value.dtype) for part in (query, key, value)]
    if rows.kind in ("auto", "flash"):
        obstacle = _obstacle_to_flash(value, dropout, softcap)
        if not obstacle:
            return _flash(parts, rows.edges, max(rows.lengths), scaling, window)
        if rows.kind == "flash":
            raise ConfigError(f"model.attn: flash takes no {obstacle}; use auto, sdpa or eager")
    if rows.kind == "sdpa" and softcap is not None:
        raise ConfigError(NO_SOFT_CAP)
    fuse = rows.kind != "eager" and softcap is None
    outputs = []
    for split in zip(*(torch.split(part, list(rows.lengths)) for part in parts), strict=True):
        sample = [part.transpose(0, 1) for part in split]  # [heads, length, head_dim]
        if fuse:
            found = _fused(sample, scaling, dropout, window)
        else:
            found = _explicit(sample, scaling, dropout, window, softcap)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kind: Kind,
    edges: Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend` as transformers calls it; equal to rounding to its eager attention of each sample alone.

    Args:
        query: float [batch, heads, length, head_dim]. key, value: the same with kv_heads, which divide heads.
        attention_mask: None, as no mask is registered under our names.
        edges, lengths, kind: see `Rows`. sliding_window, softcap: see `attend`.

    Returns:
        float [batch, length, heads, head_dim].
    """
    shape = query.transpose(1, 2).shape
    # Autocast leaves rotated queries and keys in float32; `attend` takes them to what values are in.
    queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    found = attend(
        queries,
        keys,
        values,
        Rows(edges, lengths, kind),
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    )
    return found.view(shape), None


def _fused(sample: list[Tensor], scaling: float, dropout: float, window: int | None) -> Tensor:
    query, key, value = (part[None] for part in sample)
    length = query.shape[2]
    seen = _seen(length, window, query.device) if window is not None and length > window else None
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=seen is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )[0]


def _explicit(
    sample: list[Tensor], scaling: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    query, key, value = sample
    repeats = len(query) // len(key)
    key, value = key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0)
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _seen(query.shape[1], window, query.device)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(value.dtype), dropout) @ value


def _obstacle_to_flash(value: Tensor, dropout: float, softcap: float | None) -> str:
    """What torch's flash attention does not take; empty: it takes all of it."""
    if not value.is_cuda:
        return "processor, only GPUs"
    if torch.cuda.get_device_capability(value.device) < FLASH_CAPABILITY:
        return f"GPU before compute capability {'.'.join(map(str, FLASH_CAPABILITY))}"
    if value.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(value.dtype).removeprefix('torch.')}, only bf16"
    if value.shape[-1] > FLASH_HEAD:
        return f"head of {value.shape[-1]} channels, at most {FLASH_HEAD}"
    if dropout:
        return "attention dropout"
    return "" if softcap is None else "scores with a soft cap, as this model's are"


def _flash(rows: list[Tensor], edges: Tensor, longest: int, scaling: float, window: int | None) -> Tensor:
    """All samples in one call of torch's flash attention; no GPU has run this yet."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - nothing on a CPU needs it

    query, key, value = rows
    seen = (-1 if window is None else window - 1, 0)
    found = varlen_attn(
        query, key, value, edges, edges, longest, longest, scale=scaling, window_size=seen, enable_gqa=True
    )
    assert isinstance(found, Tensor)  # noqa: S101 - a pair only where more is asked for
    return found


def _seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of a sample's tokens each sees: bool [length, length], at most `window` up to itself."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
