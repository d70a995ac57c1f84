"""TrainState <-> files: what is saved and restored, the same for every backend and world size.

A checkpoint is a folder of

    model.safetensors | adapter_model.safetensors   the trained weights, loadable by transformers | PEFT
    config.json | adapter_config.json               beside them, as those libraries expect
    tokenizer.json, ...                             the tokenizer's files, unchanged
    optimizer.safetensors                           both moments
    state.json                                      the step

Beyond `SHARD_BYTES` weights and moments are split as transformers splits them: STEM-00001-of-00003.safetensors
and so on, and STEM.safetensors.index.json beside them.

Nothing is pickled. Before: a backend gathered the state. After: `artifact.publish` commits the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from nexa_train.backends.base import TrainState
from nexa_train.data.tokenizer import FILES as TOKENIZER_FILES
from nexa_train.errors import DamagedError
from nexa_train.models.locate import Located

if TYPE_CHECKING:
    from peft import LoraConfig

MODEL, ADAPTER, OPTIMIZER, STATE = "model", "adapter_model", "optimizer", "state.json"

SHARD_BYTES = 4 << 30
"""Largest file: below what a store takes in one conditional write (5 GiB on S3)."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps a parameter, beside the step."""


def write_checkpoint(
    folder: Path, state: TrainState, *, extra: dict[str, bytes], tokenizer: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, Path]:
    """Write the files of a checkpoint; returns them by their names in the manifest."""
    folder.mkdir(parents=True)
    _save_shards(folder, ADAPTER if "adapter_config.json" in extra else MODEL, state.weights, shard_bytes)
    _save_shards(folder, OPTIMIZER, state.moments, shard_bytes)
    (folder / STATE).write_text(json.dumps({"step": state.step}), encoding="utf-8")
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return {path.name: path for path in sorted(folder.iterdir())}


def read_checkpoint(folder: Path) -> TrainState:
    """Read what `write_checkpoint` wrote.

    Raises:
        DamagedError: a file is missing.
    """
    weights = _load_shards(folder, MODEL) or _load_shards(folder, ADAPTER)
    moments = _load_shards(folder, OPTIMIZER)
    if not weights or not moments or not (folder / STATE).is_file():
        raise DamagedError(f"checkpoint {folder}: weights, {OPTIMIZER} or {STATE} is not in it")
    step = int(json.loads((folder / STATE).read_text(encoding="utf-8"))["step"])
    return TrainState(weights, moments, step)


def _save_shards(folder: Path, stem: str, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name in sorted(tensors):
        size = tensors[name].nbytes
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensors[name]
        room -= size
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _load_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    """Whatever `_save_shards` wrote under this stem; empty if nothing."""
    files = [folder / f"{stem}.safetensors", *sorted(folder.glob(f"{stem}-*-of-*.safetensors"))]
    found: dict[str, Tensor] = {}
    for file in files:
        if file.is_file():
            found |= load_file(file)
    return found


def weights_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the weights, in order of name: equal bits, equal digest."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class TorchState:
    """Weights and moments of a torch model, whole or sharded: out into whole tensors, and back.

    Args:
        causal: the transformers model, adapters injected. adapter: whether only those are trained.
    """

    def __init__(self, causal: nn.Module, optimizer: torch.optim.Optimizer, *, adapter: bool) -> None:
        self.causal, self.optimizer, self.adapter = causal, optimizer, adapter

    def gather(self, step: int, *, keep: bool) -> TrainState:
        """Whole copies on the CPU, kept where `keep`; a collective where tensors are sharded.

        Tensor by tensor, so that a rank holds one whole tensor more than it keeps, never all twice.
        """
        state = TrainState({}, {}, step)
        for name, parameter in self._trained():
            moments = self.optimizer.state.get(parameter, {})
            self._take(state.weights, name, parameter.detach(), keep=keep)
            for key in MOMENTS:
                tensor = moments.get(key)
                whole = torch.zeros_like(parameter) if tensor is None else tensor
                self._take(state.moments, f"{key}.{name}", whole, keep=keep)
        return state

    def load(self, state: TrainState) -> None:
        """Put whole tensors back, each rank its own shard; nothing crosses ranks."""
        for name, parameter in self._trained():
            with torch.no_grad():
                parameter.copy_(_like(state.weights[name], parameter))
            moments = {key: _like(state.moments[f"{key}.{name}"], parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **moments}

    def _take(self, into: dict[str, Tensor], key: str, tensor: Tensor, *, keep: bool) -> None:
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            into[key] = gathered.detach().to("cpu", copy=True).contiguous()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.causal.named_parameters():
            if parameter.requires_grad:
                # Adapters as PEFT's files spell them.
                saved = f"base_model.model.{name.replace('.default.', '.')}" if self.adapter else name
                yield saved, parameter


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded and placed as `parameter` is."""
    moved = whole.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return moved.clone()


def model_files(model: PreTrainedModel) -> dict[str, bytes]:
    """config.json of a whole model."""
    return {"config.json": model.config.to_json_string(use_diff=True).encode()}


def adapter_files(config: LoraConfig, located: Located) -> dict[str, bytes]:
    """adapter_config.json of an adapter; sets serialise in stable order, the base by its origin."""
    values: dict[str, Any] = {key: _plain(value) for key, value in config.to_dict().items()}
    values["base_model_name_or_path"] = located.origin
    return {"adapter_config.json": json.dumps(values, indent=2, sort_keys=True).encode()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
