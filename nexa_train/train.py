"""The command line of Nexa's first days, kept working: recipes by `--config-mode`, run from a checkout.

    python nexa_train/train.py --config-mode v1 --run-name NAME --model-size small --dataset FILE
    python nexa_train/train.py --config-mode v3 --nodes 4 --gpus-per-node 8 --global-batch 1024
    python nexa_train/train.py --config-mode v1 --dry-run true

One node trains here, several are planned and handed to Slurm; `--dry-run true` checks configuration and data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; they are one folder further up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from nexa_train.__main__ import guarded
from nexa_train.config import Job
from nexa_train.config.load import load_job
from nexa_train.config.support import check_supported
from nexa_train.errors import ConfigError
from nexa_train.launch.node import num_gpus
from nexa_train.registry import SIZES, family

FLAGS = {
    "dataset": "data.remote_uri",
    "nodes": "cluster.num_nodes",
    "gpus_per_node": "cluster.gpus_per_node",
    "global_batch": "training.global_batch_size",
}
"""Flags that set one key of the spec."""


def main(arguments: list[str] | None = None) -> int:
    """Plan, check, submit or train, as the flags say."""
    flags = _parser().parse_args(arguments)
    job = _load(flags)
    check_supported(job.spec)
    if flags.dry_run:
        return dry_run(job)
    if job.spec.cluster.num_nodes > 1:
        return _hand_over(job)
    from nexa_train.cli.run import run_job  # noqa: PLC0415 - planning and checking do without

    return run_job(job, as_json=False)


def dry_run(job: Job) -> int:
    """Check that every row can be read and, where the model's tokenizer is here, learnt from."""
    from nexa_train.cli.data import check_data  # noqa: PLC0415

    print(f"configuration     valid, run id {job.run_id}")
    for line in check_data(job):
        name, _, what = line.partition(": ")
        print(f"{name:<18}{what}")
    print("dry run           nothing was trained")
    return 0


def _hand_over(job: Job) -> int:
    from nexa_train.cli.check import plan_job  # noqa: PLC0415
    from nexa_train.launch.slurm import submit_or_print  # noqa: PLC0415

    plan_job(job, as_json=False)
    print(submit_or_print(job))
    return 0


def _load(flags: argparse.Namespace) -> Job:
    overrides: dict[str, Any] = {
        key: getattr(flags, flag) for flag, key in FLAGS.items() if getattr(flags, flag) is not None
    }
    if load_job(recipe=flags.config_mode).spec.cluster.world_size == 1 and flags.gpus_per_node is None:
        # A recipe for one rank takes a GPU where this machine has one.
        overrides["cluster.gpus_per_node"] = min(1, num_gpus() or 0)
    if flags.model_size is not None:
        overrides["model.name"] = _sized(flags)
    return load_job(recipe=flags.config_mode, overrides=overrides, sets=flags.set, name=flags.run_name)


def _sized(flags: argparse.Namespace) -> str:
    base = load_job(recipe=flags.config_mode).spec.model.name
    sizes = SIZES.get(family(base) or "", {})
    if flags.model_size not in sizes:
        known = ", ".join(sizes) or "none: its model comes in one size"
        raise ConfigError(f"--model-size {flags.model_size}: recipe {flags.config_mode} knows {known}")
    return sizes[flags.model_size]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Train by a shipped recipe.")
    parser.add_argument("--config-mode", required=True, help="name of a recipe in nexa_train/configs")
    parser.add_argument("--run-name", help="name of the run; default: the recipe's")
    parser.add_argument("--model-size", help="a size within the recipe's model family")
    parser.add_argument("--dataset", help="a .jsonl file, a folder or s3://")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--global-batch", type=int, help="sequences an optimiser step, over all ranks")
    parser.add_argument("--dry-run", type=_yes, default=False, metavar="true|false", help="check, train nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the spec")
    return parser


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text.lower() == "true"


if __name__ == "__main__":
    sys.exit(guarded(main))
