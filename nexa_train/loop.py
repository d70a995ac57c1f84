"""The training loop of the native backends: one step is accumulate, check, clip, move. Nothing is hidden.

Loss is summed over target tokens (or pairs) and divided by those of the whole step, over all ranks and
microbatches: accumulation, packing and the number of ranks do not change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexa_train.backends.base import RankContext, StepMetrics
from nexa_train.data.batches import Batch, Split
from nexa_train.errors import NonFiniteLossError
from nexa_train.optim import learning_rate
from nexa_train.sharding import is_distributed

NORM_ELEMENTS = 1 << 12
"""Elements whose norm is taken at once on a CPU, where torch adds them up in float32 one after the other: six digits
are left of so many, three of an embedding's twelve million."""

NAMED = 50
"""Sequences or samples that an error names at most: with weights that are not finite, all of a step are at fault."""


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
        check_finite(self.context, step, loss / denominator, norm, losses.tolist())
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


def check_finite(context: RankContext, step: int, loss: float, norm: float, losses: Sequence[float]) -> None:
    """Refuse a step before the optimiser moves, if loss or gradient norm is not finite; then a collective.

    Args:
        step: from 0. loss, norm: over all ranks, and so the same on every rank.
        losses: of this rank's microbatches, one each.

    Raises:
        NonFiniteLossError: on every rank in the same words, for whoever speaks first is taken for the cause. Names the
            ranks and samples whose loss is not finite; where all are, no rank: gradients are added up over them.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    micros = [(rank, micro) for rank in range(context.world) for micro in _microbatches(context, step, rank)]
    flags = _of_all_ranks(context, [not math.isfinite(each) for each in losses])
    faulty = [each for each, is_faulty in zip(micros, flags, strict=True) if is_faulty]
    sequences = [sequence for _, micro in faulty or micros for sequence in micro]
    where = f"Of the step's {len(micros)} microbatches {len(faulty)} had such a loss; their"
    rate = learning_rate(context.spec.optimizer, step, context.total_steps)
    raise NonFiniteLossError(
        f"step {step + 1}{_named(rank for rank, _ in faulty)}: loss {loss}, gradient norm {norm}; the optimiser did "
        f"not move. {where if faulty else 'All losses were finite, the gradient was not; the'} sequences were "
        f"{_shown(sequences)}, samples {_shown(context.train.samples(sequences))}; look at them, or lower "
        f"optimizer.lr ({rate:.3g})"
    )


def _microbatches(context: RankContext, step: int, rank: int) -> list[list[int]]:
    return replace(context, rank=rank).microbatches(step)


def _of_all_ranks(context: RankContext, flags: Sequence[bool]) -> list[bool]:
    """Each rank's flags, rank after rank; all have equally many."""
    found = torch.zeros(context.world, len(flags), dtype=torch.int32)
    found[context.rank] = torch.tensor(flags)
    return [bool(flag) for flag in summed(found, context.world).flatten()]


def _named(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return f", rank{'s' * (len(found) > 1)} {', '.join(map(str, found))}" if found else ""


def _shown(numbers: Sequence[int]) -> str:
    more = f", ... {len(numbers)} in all" if len(numbers) > NAMED else ""
    return f"[{', '.join(map(str, numbers[:NAMED]))}{more}]"


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
    shards = [gradient.to_local() if is_distributed(gradient) else gradient for gradient in gradients]
    chunks = [chunk for shard in shards for chunk in (_chunks(shard) if shard.is_cpu else [shard])]
    squared = nn.utils.get_total_norm(chunks).double().square().cpu()
    if any(is_distributed(gradient) for gradient in gradients):
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
