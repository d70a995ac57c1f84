"""Jobs trained by real backends without the launcher: here, or one after another on the ranks of one torchrun.

`python -m tests.training.ranks FOLDER` is such a rank: it trains what FOLDER/jobs.json lists and rank 0 writes what
became of each to FOLDER/trained.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.training.harness import SPEC, merged

RANKS = 2


@dataclass
class Trained:
    """What became of a job: of each step, loss and gradient norm; the trained weights as lists; validation losses."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    validation: list[float | None] = field(default_factory=list)
    weights: dict[str, list[float]] = field(default_factory=dict)


def job(rows: Path, **change: Any) -> dict[str, Any]:
    """The spec of a job over `rows`: `harness.SPEC` with some keys changed."""
    return merged(merged(SPEC, change), {"data": {"remote_uri": str(rows), **change.get("data", {})}})


def make_context(values: dict[str, Any], *, rank: int = 0, world: int = 1) -> Any:
    """The job's RankContext, its data prepared."""
    from nexa_train.backends.base import RankContext
    from nexa_train.config import JobSpec
    from nexa_train.config.support import check_supported
    from nexa_train.data.batches import Split
    from nexa_train.data.cursor import Order
    from nexa_train.data.prepare import prepare
    from nexa_train.data.tokenizer import load_tokenizer
    from nexa_train.models.locate import architecture, locate
    from nexa_train.plan import make_plan

    spec = JobSpec.model_validate(merged(values, {"cluster": {"num_nodes": world}}))
    check_supported(spec)
    located = locate(spec.model)
    tokenizer = load_tokenizer(located.folder)
    folder = prepare(spec, tokenizer).folder
    train, validation = Split(folder, "train"), Split(folder, "validation")
    plan = make_plan(spec, num_sequences=train.num_sequences, architecture=architecture(spec.model))
    assert plan.total_sequences is not None
    order = Order(train.num_sequences, plan.total_sequences, spec.training.seed)
    return RankContext(spec, plan, located, tokenizer, train, validation, order, rank, world)


def train(values: dict[str, Any], *, rank: int = 0, world: int = 1) -> Trained:
    """Train a job to its end, in this process."""
    from nexa_train.backends import make_backend

    backend: Any = make_backend(make_context(values, rank=rank, world=world))
    backend.setup()
    found = Trained()

    def note(metrics: Any) -> bool:
        found.losses.append(metrics.loss)
        found.norms.append(metrics.grad_norm)
        found.tokens.append(metrics.tokens)
        return False

    found.validation.append(backend.validate())
    backend.train(note)
    found.validation.append(backend.validate())
    for name, parameter in backend.causal.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found.weights[name] = whole.detach().flatten().tolist()
    return found


def train_on_ranks(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Trained]:
    """Train jobs on two ranks of this machine."""
    from nexa_train.data.tokenizer import load_tokenizer  # noqa: F401 - the tests' own processes start alike

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    fixed = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "-m", "tests.training.ranks", str(folder)],
        env={**os.environ, **fixed},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:9000]
    found = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    return {name: Trained(**values) for name, values in found.items()}


def main(folder: Path) -> None:
    """One rank; see the module."""
    import torch
    import torch.distributed as dist

    from nexa_train.rank import leave

    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    found = {name: asdict(train(values, rank=rank, world=world)) for name, values in jobs.items()}
    if rank == 0:
        (folder / "trained.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
