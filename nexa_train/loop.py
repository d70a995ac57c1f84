"""The training loop of the native backends: one step is accumulate, check, clip, move. Nothing is hidden.

Loss is summed over target tokens (or pairs) and divided by those of the whole step, over all ranks and
microbatches: accumulation, packing and the number of ranks do not change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexa_train.backends.base import RankContext, StepMetrics
from nexa_train.data.batches import Batch, Split
from nexa_train.errors import NonFiniteLossError
from nexa_train.optim import learning_rate

NORM_ELEMENTS = 1 << 12
"""Elements whose norm is taken at once on a CPU, where torch adds them up in float32 one after the other: six digits
are left of so many, three of an embedding's twelve million."""


class Engine:
    """A loss module and its optimiser.

    Sharded gradients cross ranks after every microbatch: kept back until the last one they would be whole on
    every rank, which is what sharding avoids.

    Args:
        loss_module: `CausalLoss`, perhaps sharded.
    """

    def __init__(self, context: RankContext, loss_module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.context, self.module, self.optimizer = context, loss_module, optimizer
        self.parameters = [parameter for parameter in loss_module.parameters() if parameter.requires_grad]

    def train(self, start: int, after_step: Callable[[StepMetrics], bool]) -> None:
        """Steps `start` (from 0) to the end of the plan; see `Backend.train`."""
        self.module.train()
        for step in range(start, self.context.total_steps):
            if after_step(self._step(step)):
                return

    def validate(self) -> float | None:
        """See `mean_loss`."""
        return mean_loss(self.module, self.context.validation, self.context)

    def _step(self, step: int) -> StepMetrics:
        # Dropout's randomness depends on step and rank alone, so that a resumed run draws the same.
        torch.manual_seed(derived_seed(self.context.spec.training.seed, step, self.context.rank))
        rate = learning_rate(self.context.spec.optimizer, step, self.context.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = [self.context.train.batch(micro) for micro in self.context.microbatches(step)]
        denominator = self.context.step_weight(step)
        losses = torch.stack([self._backward(batch, denominator) for batch in batches]).cpu()
        tokens = sum(batch.tokens for batch in batches)
        loss, tokens = summed(torch.tensor([losses.sum(), tokens], dtype=torch.float64), self.context.world).tolist()
        norm = self._clip_and_move() if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            raise NonFiniteLossError(self._not_finite(step, loss, norm, losses))
        return StepMetrics(step + 1, loss / denominator, norm, rate, int(tokens))

    def _backward(self, batch: Batch, denominator: int) -> Tensor:
        """The summed loss of a microbatch, left on its device: fetching each would hold a GPU up."""
        loss = batch_loss(self.module, batch)
        torch.autograd.backward(loss / denominator)
        return loss.detach().double()

    def _clip_and_move(self) -> float:
        """Have the optimiser move unless the gradient's norm is not finite; returns the norm before clipping."""
        norm = clip_gradients(self.parameters, self.context.spec.optimizer.max_grad_norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _not_finite(self, step: int, loss: float, norm: float, losses: Tensor) -> str:
        """Names the sequences of this rank's microbatches whose loss is not finite; where all are, all of them."""
        micros, finite = self.context.microbatches(step), losses.isfinite().tolist()
        named = [micro for micro, fine in zip(micros, finite, strict=True) if not fine] or micros
        sequences = [sequence for micro in named for sequence in micro]
        return (
            f"step {step + 1}, rank {self.context.rank}: loss {loss}, gradient norm {norm}; the optimiser did not "
            f"move. {len(finite) - sum(finite)} of this rank's {len(micros)} microbatches have such a loss; its "
            f"sequences were {sequences}, samples {self.context.train.samples(sequences)}; look at them, or lower "
            f"optimizer.lr ({self.optimizer.param_groups[0]['lr']:.3g})"
        )


def check_finite(context: RankContext, step: int, loss: float, norm: float) -> None:
    """For other libraries' trainers, before their optimiser moves; `step` counts from 0.

    Raises:
        NonFiniteLossError: names step, rank and the samples of this rank.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    sequences = context.step_sequences(step)
    raise NonFiniteLossError(
        f"step {step + 1}, rank {context.rank}: loss {loss}, gradient norm {norm}; the optimiser did not move. This "
        f"rank's sequences were {sequences}, samples {context.train.samples(sequences)}; look at them, or lower "
        "optimizer.lr"
    )


def mean_loss(module: nn.Module, split: Split, context: RankContext, *, padded: bool = False) -> float | None:
    """Mean loss over the split's target tokens or pairs, shared out over the ranks.

    None where it is empty, or a stop came in between.

    Args:
        padded: whether the module takes a sequence a row, as other libraries' models do.
    """
    if not split.num_sequences:
        return None
    module.eval()
    batch = split.padded if padded else split.batch
    total = torch.zeros((), dtype=torch.float64)
    share = range(context.rank, split.num_sequences, context.world)
    # Every rank runs as many passes as rank 0, which has most: under FSDP each is a collective.
    passes = range(0, -(-split.num_sequences // context.world), context.plan.microbatch)
    try:
        with torch.no_grad():
            for first in passes:
                if context.should_stop():
                    return None
                total += batch_loss(module, batch(share[first : first + context.plan.microbatch])).double().cpu()
    finally:
        module.train()
    return float(summed(total, context.world)) / context.weight(split, range(split.num_sequences))


def batch_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The summed loss of one microbatch, on the device where the weights are."""
    device = next(module.parameters()).device
    loss: Tensor = module(*(part.to(device) for part in (batch.input_ids, batch.position_ids, batch.targets)))
    return loss


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a norm of `limit` where it is beyond (0: never); returns the norm before, over all ranks.

    As `torch.nn.utils.clip_grad_norm_`, but exact, and so the same for any number of ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    chunks = [chunk for shard in shards for chunk in (_chunks(shard) if shard.is_cpu else [shard])]
    squared = nn.utils.get_total_norm(chunks).double().square().cpu()
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        dist.all_reduce(squared)
    norm = math.sqrt(float(squared))
    if limit and norm > limit:
        torch._foreach_mul_(shards, limit / (norm + 1e-6))
    return norm


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.flatten(), NORM_ELEMENTS)


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits that depends on all parts and nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def summed(tensor: Tensor, world: int) -> Tensor:
    """The sum over all ranks."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor
