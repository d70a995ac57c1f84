"""TrainState <-> files: what is saved and restored, the same for every backend and world size.

A checkpoint is a folder of

    model.safetensors | adapter_model.safetensors   the trained weights, loadable by transformers | PEFT
    config.json | adapter_config.json               beside them, as those libraries expect
    tokenizer.json, ...                             the tokenizer's files, unchanged
    optimizer.safetensors                           both moments
    state.json                                      the step and the cursor

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

MODEL, ADAPTER, OPTIMIZER, STATE = (
    "model.safetensors",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps a parameter, beside the step."""


def write_checkpoint(folder: Path, state: TrainState, *, extra: dict[str, bytes], tokenizer: Path) -> dict[str, Path]:
    """Write the files of a checkpoint; returns them by their names in the manifest."""
    folder.mkdir(parents=True)
    weights = ADAPTER if "adapter_config.json" in extra else MODEL
    save_file(state.weights, folder / weights, metadata={"format": "pt"})
    save_file(state.moments, folder / OPTIMIZER)
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
    weights = next((folder / name for name in (MODEL, ADAPTER) if (folder / name).is_file()), None)
    missing = [name for name in (OPTIMIZER, STATE) if not (folder / name).is_file()]
    if weights is None or missing:
        raise DamagedError(f"checkpoint {folder}: no {', '.join(missing) or 'weights'} in it")
    step = int(json.loads((folder / STATE).read_text(encoding="utf-8"))["step"])
    return TrainState(load_file(weights), load_file(folder / OPTIMIZER), step)


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
