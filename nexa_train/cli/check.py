"""`nexa validate`, `plan`, `submit`, `verify`, `version`: everything that trains nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import yaml

from nexa_train import __version__
from nexa_train.backend_config import backend_config
from nexa_train.config import Job
from nexa_train.config.support import check_supported, without_meaning
from nexa_train.errors import ConfigError
from nexa_train.launch.installed import check_installed
from nexa_train.models.locate import architecture, architecture_here, check_length
from nexa_train.plan import GIB, TrainPlan, in_precision, make_plan


def validate_job(job: Job, *, with_data: bool, as_json: bool) -> int:
    """Print that a job is valid, with what became of its data where asked; errors are raised on the way here."""
    check_supported(job.spec)
    backend_config(job.spec, plan_of(job))
    notes = None
    if with_data:
        from nexa_train.cli.data import check_data  # noqa: PLC0415 - reads everything, and only where it is asked for

        notes = check_data(job)
    if as_json:
        found = {"valid": True, "name": job.metadata.name, "run_id": job.run_id}
        _print_json(found if notes is None else {**found, "data": notes})
    else:
        print("\n".join([f"{job.metadata.name} is valid; its run id is {job.run_id}", *(notes or ())]))
    return 0


def plan_job(job: Job, *, as_json: bool) -> int:
    """Print the plan of a job."""
    check_supported(job.spec)
    plan = plan_here(job)
    if as_json:
        _print_json({"run_id": job.run_id, **asdict(plan)})
    else:
        print("\n".join(f"{name:<18}{value}" for name, value in describe_plan(job, plan)))
    return 0


def show_backend(job: Job, *, as_json: bool) -> int:
    """Print what the backend's library will be given on this machine, as YAML or JSON."""
    check_supported(job.spec)
    plan = plan_here(job)
    given = backend_config(in_precision(job.spec, plan.precision), plan)
    if as_json:
        _print_json(given)
    elif given:
        print(yaml.safe_dump(given, sort_keys=False), end="")
    else:
        print(f"# backend {job.spec.backend} is Nexa's own loop over torch: no library is configured")
    return 0


def plan_of(job: Job) -> TrainPlan:
    """The plan as far as it is known without data, weights and the machine that it is for."""
    check_length(job.spec.model)
    return make_plan(job.spec, architecture=architecture(job.spec.model))


def plan_here(job: Job) -> TrainPlan:
    """The plan with which `nexa run` would begin on this machine, as far as it is known without data.

    Says on stderr what would still change it: a model that is not here.
    """
    from nexa_train.launch.node import Node, first_plan  # noqa: PLC0415 - costs as much as all of the rest

    sizes = architecture_here(job.spec.model)
    training = job.spec.training
    if sizes is None and training.microbatch_size_per_gpu == training.grad_accumulation_steps == "auto":
        print(
            f"nexa: training.microbatch_size_per_gpu: auto is planned as 1 and may become more, for the sizes of "
            f"{job.spec.model.name} are not known before a run has fetched or converted it",
            file=sys.stderr,
        )
    return first_plan(job, Node(ranks=job.spec.cluster.world_size), sizes)


def describe_plan(job: Job, plan: TrainPlan) -> list[tuple[str, str]]:
    """The plan, for people: names and values in reading order."""
    length = f"{plan.total_steps} steps" if plan.total_steps else f"{job.spec.training.epochs or 1:g} epochs"
    rows = [
        ("run id", job.run_id),
        (
            "model",
            f"{job.spec.model.name}, {job.spec.tuning.type} tuning, {job.spec.method.type} on {job.spec.backend}",
        ),
        ("ranks", f"{plan.world_size} = {plan.nodes} nodes x {plan.ranks_per_node}"),
        (
            "global batch",
            f"{plan.global_batch} sequences = {plan.microbatch} a microbatch x {plan.accumulation} accumulated "
            f"x {plan.world_size} ranks",
        ),
        ("length", f"{length}, a checkpoint every {plan.save_every}"),
        ("artifacts", job.spec.artifacts.uri),
    ]
    if plan.memory is None or plan.checkpoint_bytes is None:
        return [*rows, ("memory a rank", "unknown: the sizes of this model are in its weights' configuration")]
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in asdict(plan.memory).items())
    return [
        *rows,
        ("memory a rank", f"about {plan.memory.total / GIB:.2f} GiB ({parts})"),
        ("checkpoint", f"about {plan.checkpoint_bytes / GIB:.2f} GiB"),
    ]


def submit_job(job: Job, *, slurm: bool) -> int:
    """Submit to Slurm.

    Raises:
        ConfigError: no scheduler was named; or this environment, which is the nodes' too, cannot carry the backend.
    """
    from nexa_train.launch.slurm import submit_or_print  # noqa: PLC0415 - only where it is asked for

    if not slurm:
        raise ConfigError("submit: name a scheduler: --slurm; on Kubernetes the same file goes to kubectl apply -f")
    check_supported(job.spec)
    backend_config(job.spec, plan_of(job))
    check_installed(job.spec.backend)
    if ignored := without_meaning(job.spec, "slurm"):
        print(f"nexa: not applied on Slurm: {', '.join(ignored)}", file=sys.stderr)
    print(submit_or_print(job))
    return 0


def verify_uri(uri: str, *, as_json: bool) -> int:
    """Verify and print; 1 where anything is wrong."""
    from nexa_train.artifact.verify import verify  # noqa: PLC0415 - stores are only needed here

    report = verify(uri)
    if as_json:
        _print_json({"ok": report.ok, **asdict(report)})
        return 0 if report.ok else 1
    for one in report.manifests:
        print(f"{one.uri}  step {one.step}  sha256:{one.digest}")
    for problem in report.problems:
        print(f"damaged: {problem}")
    verdict = "verified" if report.ok else f"{len(report.problems)} problems in"
    print(f"{verdict}: {len(report.manifests)} manifests, {report.num_files} files, {report.num_bytes} bytes")
    return 0 if report.ok else 1


def print_version(*, as_json: bool) -> int:
    """Print the version."""
    if as_json:
        _print_json({"version": __version__})
    else:
        print(f"nexa {__version__}")
    return 0


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, sort_keys=True, ensure_ascii=False, default=str))
