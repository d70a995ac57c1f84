"""Tensors of a torch model and its optimiser: out into this rank's pieces, and back.

Before: a backend built model and optimiser. After: `saver` writes what was staged; `files.Saved` gives it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nexa_train.backends.base import Piece, Staged
from nexa_train.checkpoint.files import Saved
from nexa_train.errors import ForeignError
from nexa_train.models.build import Causal
from nexa_train.models.locate import Located
from nexa_train.sharding import is_distributed, is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig


class Buffers:
    """Memory on the CPU, pinned where a GPU copies into it, and kept: fresh pages cost as much as the copy."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="stage")

    def begin(self, sources: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Future[None]]:
        """Copy all `sources` in a thread, into the memory that the last call returned for the same names.

        The sources must not change until the future is done.
        """
        copies = {name: self._buffer(name, source) for name, source in sources.items()}
        stream = None
        if any(source.is_cuda for source in sources.values()):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
        pairs = [(copies[name], source.detach()) for name, source in sources.items()]
        return copies, self.thread.submit(_copy, pairs, stream)

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
            kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._kept[name] = kept
        return kept


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], stream: torch.cuda.Stream | None) -> None:
    with torch.cuda.stream(stream):
        for into, source in pairs:
            if source.is_cpu and source.is_contiguous():
                # By this thread alone, at the memory's own speed. torch would take training's threads, one barrier a
                # tensor: three times the processor time, and ten times the wait on a machine that does other work too.
                np.copyto(_bytes(into), _bytes(source))
            else:
                into.copy_(source, non_blocking=True)
    if stream is not None:
        stream.synchronize()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


class TorchState:
    """Weights and optimiser of a torch model, whole or sharded along dim 0.

    Of the optimiser every tensor is taken that it keeps for a parameter, but for `step`: that is the run's own
    for every parameter.

    Args:
        causal: the model, adapters injected. adapter: whether only those are trained.
        rank, world: tensors that are whole on every rank are staged by one of them.
    """

    def __init__(
        self, causal: nn.Module, optimizer: torch.optim.Optimizer, *, adapter: bool, rank: int, world: int
    ) -> None:
        self.causal, self.optimizer, self.adapter = causal, optimizer, adapter
        self.rank, self.world = rank, world
        self.buffers, self.copied = Buffers(), Future[None]()
        self.copied.set_result(None)
        # Nothing but the optimiser changes what is staged: forward and backward may run while it is copied
        # (Maurya et al. 2024, DataStates-LLM).
        optimizer.register_step_pre_hook(lambda *_: self.copied.result())

    @torch.no_grad()
    def stage(self, step: int) -> Staged:
        """See `Backend.stage`. The optimiser waits, before it moves, until all is copied."""
        weights = dict(trained_parameters(self.causal, adapter=self.adapter))
        kept = {
            f"{key}.{name}": tensor
            for name, parameter in weights.items()
            for key, tensor in self._kept(parameter).items()
        }
        pieces = self._pieces({**weights, **kept})
        return Staged(
            {name: piece for name, piece in pieces.items() if name in weights},
            {name: piece for name, piece in pieces.items() if name in kept},
            step,
            self.copied.result,
        )

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """See `Backend.restore`.

        Raises:
            ForeignError: tensors, or shapes, are not those of this model and optimiser.
        """
        self._make_optimizer_state()
        places: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(self.causal, adapter=self.adapter):
            places[name] = parameter
            places |= {f"{key}.{name}": tensor for key, tensor in self._kept(parameter).items()}
        check_fits(saved, {name: tuple(tensor.shape) for name, tensor in places.items()})
        for name, tensor in places.items():
            local, start = local_part(tensor)
            local.copy_(saved.elements(name, start, local.numel()).view(local.shape))
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], saved.step)

    def _pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        sources, starts = {}, {}
        for number, (name, tensor) in enumerate(tensors.items()):
            if self.world > 1 and not is_sharded(tensor) and number % self.world != self.rank:
                continue
            sources[name], starts[name] = local_part(tensor)
        copies, self.copied = self.buffers.begin(sources)
        return {name: Piece(copies[name], starts[name], tuple(tensors[name].shape)) for name in copies}

    def _kept(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if key != "step" and isinstance(value, Tensor)}

    def _make_optimizer_state(self) -> None:
        """Have the optimiser make its state in its own form: a step with no gradient at no learning rate."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def trained_parameters(causal: nn.Module, *, adapter: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained of a model, by the names that its files have: adapters as PEFT spells them."""
    for name, parameter in causal.named_parameters():
        if parameter.requires_grad:
            yield f"base_model.model.{name.replace('.default.', '.')}" if adapter else name, parameter


def check_fits(saved: Saved, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a checkpoint has the tensors of these names and shapes, and no others.

    Raises:
        ForeignError: it has not. Every byte is as committed: another attempt, or another download, changes nothing.
    """
    if differences := sorted(saved.names ^ shapes.keys()):
        shown = ", ".join(differences[:5])
        raise ForeignError(f"{saved.folder}: the checkpoint and the job differ in {len(differences)} tensors: {shown}")
    for name, shape in shapes.items():
        if saved.shape(name) != shape:
            raise ForeignError(f"{saved.folder}: {name} is {saved.shape(name)}, the job's is {shape}")


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and at which element of the flattened whole it begins.

    Raises:
        TypeError: it is sharded otherwise than along dim 0 over one mesh dimension.
    """
    if not is_distributed(tensor):
        return tensor, 0
    if not is_sharded(tensor):
        return tensor.to_local(), 0
    if len(tensor.placements) != 1 or not tensor.placements[0].is_shard(0):
        raise TypeError(f"a tensor is placed as {tensor.placements}, expected shards along dim 0")
    rows = tensor.shape[0]
    first = min(rows, tensor.device_mesh.get_local_rank() * -(-rows // tensor.device_mesh.size()))
    return tensor.to_local(), first * (tensor.numel() // max(1, rows))


def model_files(model: Causal) -> dict[str, bytes]:
    """config.json of a whole model, which makes use of its cache again: that is off for training alone."""
    config: Any = model.config
    if getattr(config, "use_cache", None) is False:
        config = deepcopy(config)
        config.use_cache = True
    said: str = config.to_json_string(use_diff=True)
    return {"config.json": said.encode()}


def adapter_files(config: LoraConfig, located: Located) -> dict[str, bytes]:
    """adapter_config.json of an adapter; sets serialise in stable order, and PEFT can load the base it names."""
    values: dict[str, Any] = {key: _plain(value) for key, value in config.to_dict().items()}
    values["base_model_name_or_path"], values["revision"] = located.loadable, located.revision
    return {"adapter_config.json": json.dumps(values, indent=2, sort_keys=True).encode()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
