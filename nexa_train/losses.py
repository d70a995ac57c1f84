"""Hidden states -> the summed loss of target tokens. Used by the native backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORE = -100
"""Target id of tokens that do not count."""

CHUNK_TOKENS = 1024
"""Target tokens whose logits are held at once: 1024 x 49k x 4 bytes = 200 MB."""


class CausalLoss(nn.Module):
    """A causal language model whose forward pass is its loss: no logits leave it.

    As one module, so that FSDP's root gathers embedding and head around the whole of it.

    Args:
        bf16: whether matrix products run in bfloat16, weights staying as they are. Not where FSDP casts.
    """

    def __init__(self, causal: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.causal, self.bf16 = causal, bf16

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """Sum over target tokens of -log p(target), in float32, a scalar.

        Args:
            input_ids: int64 [batch, length], padded on the right.
            position_ids: int64 [batch, length], beginning anew with each packed sample: transformers derives
                from that jump that samples must not see each other.
            targets: int64 [batch, length], the next token, or IGNORE.
        """
        decoder, counted = self.causal.base_model, targets != IGNORE
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            return summed_loss(hidden[counted], targets[counted], self.causal.get_output_embeddings())


def summed_loss(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Cross entropy summed over tokens.

    Only target tokens go through the head, and beyond `CHUNK_TOKENS` of them the logits of a chunk are
    recomputed in the backward pass instead of kept.

    Args:
        hidden: float [tokens, d_model]. targets: int64 [tokens]. head: d_model -> vocabulary.
    """
    if len(targets) <= CHUNK_TOKENS:
        return _chunk_loss(hidden, targets, head)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), CHUNK_TOKENS):
        rows, wanted = (tensor[start : start + CHUNK_TOKENS] for tensor in (hidden, targets))
        total = total + checkpoint(_chunk_loss, rows, wanted, head, use_reentrant=False)
    return total


def _chunk_loss(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
