"""Token ids -> the summed loss of target tokens, without logits ever standing whole. Used by the native backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nexa_train.config.spec import DpoMethod, Method
from nexa_train.models.attention import sample_edges

if TYPE_CHECKING:
    from nexa_train.models.build import Causal

IGNORE = -100
"""Target id of tokens that do not count."""

CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Logits in float32 that are held at once: on a CPU few enough to stay near it, on a GPU enough to keep it busy."""


class CausalLoss(nn.Module):
    """A causal language model whose forward pass is its loss: no logits leave it.

    As one module, so that FSDP's root gathers embedding and head around the whole of it.

    Args:
        bf16: whether matrix products run in bfloat16, weights staying as they are. Not where FSDP casts.
    """

    def __init__(self, causal: Causal, *, bf16: bool = False) -> None:
        super().__init__()
        self.causal, self.bf16 = causal, bf16

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """Sum over target tokens of -log p(target), in float32, a scalar.

        Args:
            input_ids: int64 [batch, length], samples one after another, or padded on the right.
            position_ids: int64 [batch, length], beginning anew with each sample: samples do not see each other.
            targets: int64 [batch, length], the next token, or IGNORE.
        """
        counted = targets != IGNORE
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = hidden_states(self.causal, input_ids, position_ids)
            return summed_loss(hidden[counted], targets[counted], self.causal)


class TargetLogProbs(nn.Module):
    """A causal language model whose forward pass is what it gives each target: no logits leave it.

    Args:
        bf16: see `CausalLoss`.
    """

    def __init__(self, causal: Causal, *, bf16: bool = False) -> None:
        super().__init__()
        self.causal, self.bf16 = causal, bf16

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """log p(target), float32 [targets], in the order of the rows; see `CausalLoss.forward`."""
        counted = targets != IGNORE
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = hidden_states(self.causal, input_ids, position_ids)
            return log_probs(hidden[counted], targets[counted], self.causal)


class PreferenceLoss(nn.Module):
    """Direct Preference Optimization (Rafailov et al. 2023, equation 7) as one module, as `CausalLoss` is.

    Args:
        causal: what is trained.
        reference: the frozen model it is compared with; None: `causal` without its adapters.
        beta: how strongly the reference pulls.
    """

    def __init__(self, causal: Causal, reference: Causal | None, beta: float, *, bf16: bool = False) -> None:
        super().__init__()
        self.beta, self.policy = beta, TargetLogProbs(causal, bf16=bf16)
        # A module of its own, so that FSDP holds its embedding and head whole only while it runs.
        self.reference = None if reference is None else TargetLogProbs(reference, bf16=bf16)

    def train(self, mode: bool = True) -> PreferenceLoss:
        """The reference has no dropout, whatever the policy has."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """Sum over pairs of -log sigmoid(beta x (what the chosen gained - what the rejected gained)), a scalar.

        Args:
            input_ids, position_ids, targets: see `CausalLoss.forward`; every row holds a pair, the chosen
                sample before the rejected one.
        """
        expected = self._expected(input_ids, position_ids, targets)  # first, while no activations are held
        gained = self.policy(input_ids, position_ids, targets) - expected
        sample = (position_ids == 0).flatten().cumsum(0) - 1
        of_target = sample[(targets != IGNORE).flatten()]
        num_pairs = (int(sample[-1]) + 1) // 2  # One token alone, where a rank has nothing left to do, is none.
        gains = gained.new_zeros(int(sample[-1]) + 1).index_add(0, of_target, gained)[: 2 * num_pairs]
        chosen, rejected = gains.view(num_pairs, 2).unbind(dim=1)
        return -F.logsigmoid(self.beta * (chosen - rejected)).sum()

    @torch.no_grad()
    def _expected(self, *batch: Tensor) -> Tensor:
        if self.reference is not None:
            found: Tensor = self.reference(*batch)
            return found
        was_training = self.policy.training
        self.policy.eval()
        with without_adapters(self.policy):
            found = self.policy(*batch)
        self.policy.train(was_training)
        return found


def make_loss(method: Method, causal: Causal, reference: Causal | None, *, bf16: bool) -> CausalLoss | PreferenceLoss:
    """The loss of a method over a model; `reference` see `PreferenceLoss`."""
    if isinstance(method, DpoMethod):
        return PreferenceLoss(causal, reference, method.beta, bf16=bf16)
    return CausalLoss(causal, bf16=bf16)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """PEFT's layers compute what they did before adapters.

    Their own switch also takes `requires_grad` from the adapters and gives it back, which FSDP must not see.
    """
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def hidden_states(causal: Causal, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What the head is applied to: float [batch, length, d_model]; see `CausalLoss.forward` for the arguments."""
    edges = sample_edges(position_ids)
    decoded = causal.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        edges=edges,
        lengths=tuple(edges.diff().tolist()),
    )
    hidden: Tensor = decoded.last_hidden_state
    return hidden


def summed_loss(hidden: Tensor, targets: Tensor, causal: Causal) -> Tensor:
    """Cross entropy summed over tokens, of logits that are the head's product, bent by the model's cap if it has one.

    Args:
        hidden: float [tokens, d_model]. targets: int64 [tokens].
    """
    device, cap = hidden.device.type, getattr(causal.config, "final_logit_softcapping", None)
    weight: Tensor = causal.get_output_embeddings().weight
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    loss: Tensor = _HeadLoss.apply(hidden.to(dtype), weight, targets, cap, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Head and cross entropy, whose gradients are made beside the loss, chunk by chunk of tokens.

    So logits are neither kept nor made twice (Hsu et al. 2024, Liger Kernel, FusedLinearCrossEntropy). Products are
    made in the type of `hidden`; statistics, and the sum of the weight's gradient over chunks, in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, learning: bool) -> Tensor:
        """See `summed_loss`; `learning`: whether gradients will be asked for."""
        table, size = weight.to(hidden.dtype), _chunk_tokens(hidden.device.type, len(weight))
        products = hidden.new_empty(min(size, len(hidden)), len(table))
        logs = torch.empty_like(products, dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if learning else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if learning and ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), size):
            rows, wanted = hidden[start : start + size], targets[start : start + size, None]
            scores = torch.mm(rows, table.T, out=products[: len(rows)]).float()
            if cap is not None:
                scores.div_(cap).tanh_().mul_(cap)
            slopes = torch.log_softmax(scores, dim=1, out=logs[: len(rows)])
            total -= slopes.gather(1, wanted).sum(dtype=torch.float64)
            if hidden_grad is None:
                continue
            slopes.exp_()
            slopes.scatter_(1, wanted, slopes.gather(1, wanted) - 1)  # now the loss's slope by each score
            if cap is not None:
                slopes.mul_(1 - scores.div_(cap).square_())
            torch.mm(slopes.to(table.dtype), table, out=hidden_grad[start : start + size])
            if weight_grad is not None:
                _add_product(weight_grad, slopes.to(rows.dtype).T, rows)
        ctx.gradients, ctx.weight_type = (hidden_grad, weight_grad), weight.dtype
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scales in place what `forward` made, and gives it away.

        Raises:
            RuntimeError: for the second time.
        """
        (hidden_grad, weight_grad), ctx.gradients = ctx.gradients, (None, None)
        if hidden_grad is None:
            raise RuntimeError("the gradients of this loss were given away by its first backward pass")
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight_type)
        return hidden_grad.mul_(scale), weight_grad, None, None, None


def log_probs(hidden: Tensor, targets: Tensor, causal: Causal) -> Tensor:
    """log p of each target, float32 [tokens]; see `summed_loss`.

    What each counts for in the end is not known yet, so the logits of a chunk are made again in the backward pass.
    """
    weight, cap = causal.get_output_embeddings().weight, getattr(causal.config, "final_logit_softcapping", None)
    size = _chunk_tokens(hidden.device.type, len(weight))
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    again = partial(checkpoint, _chunk_log_probs, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(rows, wanted, weight, cap) for rows, wanted in chunks])


def _chunk_log_probs(hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    scores = F.linear(hidden, weight).float()
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return -F.cross_entropy(scores, targets, reduction="none")


def _chunk_tokens(device: str, vocabulary: int) -> int:
    return max(1, CHUNK_BYTES[device] // (4 * vocabulary))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in float32 whatever the product is made in."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
