"""Backend axolotl on two ranks of a CPU, sharded as on two GPUs.

accelerate and Axolotl shard where they find devices. Here they are told of two and given gloo and the processor: that
alone is not as on GPUs. Loader, trainer, FSDP, ZeRO and their collectives are real.

`python -m tests.training.axolotl_sharded FOLDER` trains what FOLDER/jobs.json lists, each job in two ranks forked from
a process that has imported Axolotl already, and again from the checkpoint of its third step.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from nexa_train.checkpoint import Saved
from tests.training.nursery import free_port
from tests.training.ranks import make_context

WORLD = 2
STEP = 3
"""After which the checkpoint is made."""


def main(folder: Path) -> None:
    """Train all jobs; FOLDER/NAME/LEG.json says what became of each: losses, and the trained weights as lists."""
    for module in ("nexa_train.backends.axolotl", "axolotl.core.builders", "deepspeed"):
        importlib.import_module(module)  # what a fork finds imported

    for name, values in json.loads((folder / "jobs.json").read_text(encoding="utf-8")).items():
        (folder / name).mkdir()
        for leg in ("whole", "resumed"):
            port = free_port()
            ranks = [os.fork() or _rank(values, folder / name, leg, rank, port) for rank in range(WORLD)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
            if any(codes):
                sys.exit(f"{name}, {leg}: ranks ended with {codes}")


def _rank(values: dict[str, Any], folder: Path, leg: str, rank: int, port: int) -> int:
    code = 1
    try:
        _train(values, folder, leg, rank, port)
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must not go on in its parent's place
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train(values: dict[str, Any], folder: Path, leg: str, rank: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    from nexa_train.backends import make_backend

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    context = replace(make_context(values), rank=rank, world=WORLD)
    _pretend_devices(context.spec.axolotl.sharding)
    backend: Any = make_backend(context)
    backend.setup()
    if leg == "resumed":
        backend.restore(Saved(folder))
    losses: list[float] = []

    def note(metrics: Any) -> bool:
        losses.append(metrics.loss)
        if metrics.step == STEP:
            _save(folder, *_gathered(backend), adapter=backend.lora is not None)
        return False

    backend.train(note)
    weights, _ = _gathered(backend)
    if rank == 0:
        kept = {name: tensor.flatten().tolist() for name, tensor in weights.items()}
        found = {"kind": type(backend.trainer.model_wrapped).__name__, "losses": losses, "weights": kept}
        (folder / f"{leg}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _pretend_devices(sharding: str) -> None:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if sharding == "deepspeed":  # finds out for itself that there is nothing but a CPU
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda config, _: build(config, "cpu")


def _gathered(backend: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole weights and optimiser tensors, put together from both ranks' pieces; together they cover each once."""
    import torch
    import torch.distributed as dist

    staged = backend.stage().ready()
    wholes = []
    for pieces in (staged.weights, staged.optimizer):
        held: list[Any] = [None] * WORLD
        dist.all_gather_object(held, pieces)
        tensors: dict[str, Any] = {}
        covered: dict[str, int] = {}
        for name, piece in (item for mine in held for item in mine.items()):
            flat = tensors.setdefault(name, torch.empty(piece.shape)).view(-1)
            flat[piece.start : piece.start + piece.tensor.numel()] = piece.tensor.flatten()
            covered[name] = covered.get(name, 0) + piece.tensor.numel()
        assert covered == {name: tensor.numel() for name, tensor in tensors.items()}
        wholes.append(tensors)
    return wholes[0], wholes[1]


def _save(folder: Path, weights: dict[str, Any], optimizer: dict[str, Any], *, adapter: bool) -> None:
    from safetensors.torch import save_file

    if os.environ["RANK"] == "0":
        save_file(weights, folder / f"{'adapter_model' if adapter else 'model'}.safetensors")
        save_file(optimizer, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": STEP}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
