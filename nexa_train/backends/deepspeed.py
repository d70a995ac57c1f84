"""DeepSpeed's ZeRO 1, 2 and 3 (Rajbhandari et al. 2020) below the loop of `loop.py`; full tuning and LoRA.

The loop decides a step, as on every native backend: sequences, loss, denominator, learning rate. DeepSpeed's engine
shards, adds gradients up over the ranks, clips them and has torch's AdamW move. Its own checkpoints are not used:
they are pickles.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexa_train.backend_config.deepspeed import deepspeed_config
from nexa_train.backends.base import Piece, RankContext, Staged, StepMetrics
from nexa_train.backends.common import TorchBackend
from nexa_train.checkpoint import Buffers, Saved, check_fits, trained_parameters
from nexa_train.config.spec import JobSpec
from nexa_train.data.batches import Batch
from nexa_train.loop import Engine, batch_loss
from nexa_train.losses import CausalLoss
from nexa_train.optim import make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


class DeepspeedBackend(TorchBackend):
    """See `base.Backend`."""

    def setup(self) -> None:
        """Build on every rank from the same seed; DeepSpeed keeps this rank's share."""
        spec = self.context.spec
        self.build_native()
        trained = dict(trained_parameters(self.causal, adapter=self.lora is not None))
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        # DeepSpeed would begin with weights rounded to bf16.
        exact = {name: parameter.detach() for name, parameter in trained.items()} if _bf16(spec) else {}
        zero = _initialize(CausalLoss(self.causal), self.context)
        self.state = state = ZeroState(zero, trained, shapes, self.context.rank)
        state.set_weights(exact)
        self.engine = ZeroEngine(self.context, zero)

    def validate(self) -> float | None:
        """See `Engine.validate`."""
        return self.engine.validate()

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """See `Engine.train`."""
        self.engine.train(self.done, self.counted(after_step))


class ZeroEngine(Engine):
    """The loop, with DeepSpeed's engine in the place of module and optimiser."""

    def __init__(self, context: RankContext, zero: Any) -> None:
        super().__init__(context, zero, zero.optimizer)
        self.zero, self.microbatches_done = zero, 0

    def _backward(self, batch: Batch, denominator: int) -> Tensor:
        self.microbatches_done += 1
        # Before the forward pass: at a step's last microbatch gradients are handed to the optimiser's shares.
        self.zero.set_gradient_accumulation_boundary(self.microbatches_done == self.context.plan.accumulation)
        loss = batch_loss(self.zero, batch)
        # DeepSpeed makes the mean over ranks of what is to be a sum.
        self.zero.backward(loss / denominator * self.context.world, scale_wrt_gas=False)
        return loss.detach().double()

    def _clip_and_move(self) -> float:
        """Where the norm is not finite, DeepSpeed drops the gradients and nothing moves, at every stage."""
        self.microbatches_done = 0
        self.zero.step()
        return float(self.zero.get_global_grad_norm())


@dataclass(frozen=True)
class Share:
    """What this rank holds of one weight.

    Attributes:
        name, shape: of the whole weight, as saved.
        flat: float32, 1-d, many weights' shares end to end; the optimiser's parameter.
        offset: where in `flat` this share begins. start: where in the flattened weight. count: elements.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The same elements of `flat` or of a tensor laid out like it, as a view."""
        return flat.narrow(0, self.offset, self.count)


class ZeroState:
    """Weights and moments where ZeRO has put them: out into this rank's pieces, and back.

    DeepSpeed's own way out (`safe_get_full_optimizer_state`) is a collective a tensor, and at stages 1 and 2 finds
    the moments of the first parameter group alone.

    Args:
        zero: DeepSpeed's engine. trained, shapes: what is trained, by the names it is saved under.
    """

    def __init__(self, zero: Any, trained: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
        self.zero, self.shapes = zero, shapes
        self.buffers, self.copied = Buffers(), Future[None]()
        self.copied.set_result(None)
        zero.optimizer.optimizer.register_step_pre_hook(lambda *_: self.copied.result())  # as in `TorchState`
        self.weights_are_sharded = bool(zero.zero_optimization_partition_weights())
        find = _shares_of_sharded if self.weights_are_sharded else _shares_of_whole
        self.shares = [share for share in find(zero.optimizer, trained, shapes, rank) if share.count]
        self.moments = zero.optimizer.optimizer.state
        for flat in {id(share.flat): share.flat for share in self.shares}.values():
            # As AdamW would at its first step; a state can be asked for, or restored, before that.
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            # The fused kernel reads the count where the weights are.
            self.moments[flat] = {"step": torch.zeros((), device=flat.device), **zeros}

    @torch.no_grad()
    def stage(self, step: int) -> Staged:
        """See `base.Backend.stage`. The optimiser waits, before it moves, until all is copied."""
        weights = {share.name: share for share in self.shares}
        moments = {f"{key}.{name}": (share, key) for name, share in weights.items() for key in MOMENTS}
        copies, self.copied = self.buffers.begin(
            {name: share.of(share.flat) for name, share in weights.items()}
            | {name: share.of(self.moments[share.flat][key]) for name, (share, key) in moments.items()}
        )
        return Staged(
            {name: Piece(copies[name], share.start, share.shape) for name, share in weights.items()},
            {name: Piece(copies[name], share.start, share.shape) for name, (share, _) in moments.items()},
            step,
            self.copied.result,
        )

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """See `base.Backend.restore`."""
        moments = {f"{key}.{name}": shape for name, shape in self.shapes.items() for key in MOMENTS}
        check_fits(saved, {**self.shapes, **moments})
        for share in self.shares:
            state = self.moments[share.flat]
            for name, flat in {"": share.flat, **{f"{key}.": state[key] for key in MOMENTS}}.items():
                share.of(flat).copy_(saved.elements(f"{name}{share.name}", share.start, share.count))
            state["step"].fill_(saved.step)
        self._follow()

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole weights."""
        for share in self.shares:
            if share.name in weights:
                whole = weights[share.name].flatten()
                share.of(share.flat).copy_(whole[share.start : share.start + share.count])
        self._follow()

    def _follow(self) -> None:
        """Have what the model computes with follow the float32 weights; a collective."""
        optimizer = self.zero.optimizer
        if not self.weights_are_sharded:
            optimizer.update_lp_params()
            return
        self.zero.empty_partition_cache()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)


def _shares_of_whole(
    optimizer: Any, trained: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> Iterator[Share]:
    """Stages 1 and 2: the weights of a group end to end, cut into one part a rank."""
    for name, parameter in trained.items():
        if (place := parameter._hp_mapping) is not None:
            (flat,) = optimizer.optimizer.param_groups[place.param_group_index]["params"]
            here, there = place.hp_fragment_address, place.lp_fragment_address
            yield Share(name, shapes[name], flat, here.start, there.start, here.numel)


def _shares_of_sharded(
    optimizer: Any, trained: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> Iterator[Share]:
    """Stage 3: each weight cut into one part a rank, all of a size, so that the last may end in padding."""
    for name, parameter in trained.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(rank * size, parameter.ds_numel)
        count = min(size, parameter.ds_numel - start)
        yield Share(name, shapes[name], optimizer.fp32_partitioned_groups_flat[group], offset, start, count)


def _initialize(module: CausalLoss, context: RankContext) -> Any:
    """DeepSpeed's engine around a loss module."""
    deepspeed, spec = library(), context.spec
    config = deepspeed_config(spec, context.plan)
    # While they have their shapes; DeepSpeed trusts no subclass.
    optimizer = make_optimizer(spec.optimizer, module.named_parameters(), adamw=torch.optim.AdamW)
    if not dist.is_initialized():  # one rank
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed()
    if _bf16(spec):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if spec.deepspeed.zero_stage == 3:
        # A tensor at a time: the whole model never stands on one GPU.
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(next(module.parameters()).device)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def library() -> Any:
    """DeepSpeed, without what it prints on standard output and compiles when it starts.

    Its one operator for CPUs is an all-reduce for inference. Not to build it leaves a rank without need of a
    compiler, on any machine and in any image.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed  # noqa: PLC0415 - reads the environment

    logger = deepspeed.utils.logger
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # none
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    return deepspeed


def _bf16(spec: JobSpec) -> bool:
    return spec.training.precision == "bf16"
