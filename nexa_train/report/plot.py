"""Manifests of a run -> the plot of its losses, as SVG. Reads the store, so it shows what was committed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nexa_train.artifact.manifest import Manifest
from nexa_train.artifact.publish import committed_folders, read_manifest
from nexa_train.config import Job
from nexa_train.errors import DamagedError, NotFoundError
from nexa_train.store import open_store


def plot_run(job: Job) -> tuple[Path, float | None]:
    """Draw the losses of a run's checkpoints; returns the SVG's path and the validation loss before the first step.

    A damaged checkpoint is left out. The plot goes beside the artifacts where those are in a folder, else below
    `artifacts` here.
    """
    store = open_store(job.spec.artifacts.uri)
    manifests = []
    for committed in committed_folders(store, job.run_id):
        with suppress(DamagedError, NotFoundError):  # `nexa verify` is who says so; others may delete them meanwhile
            manifests.append(read_manifest(store, committed).manifest)
    folder = Path("artifacts" if "://" in store.uri else store.uri) / "reports" / job.run_id
    folder.mkdir(parents=True, exist_ok=True)
    draw(manifests, folder / "loss.svg", title=job.metadata.name)
    return folder / "loss.svg", manifests[0].metrics.get("initial_validation_loss") if manifests else None


def draw(manifests: list[Manifest], path: Path, *, title: str) -> None:
    """Write the SVG; equal manifests give equal bytes."""
    import matplotlib as mpl  # noqa: PLC0415 - seconds to import, needed only once a run has ended
    from matplotlib.figure import Figure  # noqa: PLC0415

    logs = [entry for manifest in manifests for entry in manifest.logs]
    held_out = [(m.step, m.metrics["validation_loss"]) for m in manifests if "validation_loss" in m.metrics]
    if manifests and "initial_validation_loss" in manifests[0].metrics:
        held_out.insert(0, (0, manifests[0].metrics["initial_validation_loss"]))
    with mpl.rc_context({"svg.hashsalt": "nexa", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([entry["step"] for entry in logs], [entry["loss"] for entry in logs], label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", label="validation")
        axes.set(xlabel="step", ylabel="loss a target token (nats)", title=title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
