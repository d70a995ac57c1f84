"""The command line. Here are only names, options and help: each command imports its work when it runs.

`nexa --help` must not wait for pydantic, rich or torch.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def _end(code: int | None, **_options: object) -> None:
    raise typer.Exit(code or 0)


app = typer.Typer(
    name="nexa",
    result_callback=_end,
    help="One description of a training job; the same result on this machine, on Slurm and on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Output(StrEnum):
    """How a command answers."""

    text = "text"
    json = "json"


JobFile = Annotated[Path | None, typer.Argument(help="Job file: a NexaTrainingJob, or its spec in snake_case.")]
Recipe = Annotated[str | None, typer.Option("--config-mode", help="A shipped recipe instead of a file, such as v1.")]
RunName = Annotated[str | None, typer.Option("--run-name", help="Name of the run; default: the job's.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value of the spec, such as training.seed=1.")]
WithData = Annotated[bool, typer.Option("--data", help="Also read, tokenise and audit its data, as a run would.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs.")]


@app.command()
def run(
    job: JobFile = None,
    config_mode: Recipe = None,
    run_name: RunName = None,
    sets: Sets = None,
    output: OutputOption = Output.text,
) -> int:
    """Train on this machine; the same run goes on where it stopped."""
    from nexa_train.cli.run import run_job
    from nexa_train.config.load import load_job

    return run_job(load_job(job, recipe=config_mode, sets=sets or (), name=run_name), as_json=output is Output.json)


@app.command()
def validate(
    job: JobFile = None,
    config_mode: Recipe = None,
    sets: Sets = None,
    data: WithData = False,
    output: OutputOption = Output.text,
) -> int:
    """Check a job file; names file, line, key and what is allowed."""
    from nexa_train.cli.check import validate_job
    from nexa_train.config.load import load_job

    found = load_job(job, recipe=config_mode, sets=sets or ())
    return validate_job(found, with_data=data, as_json=output is Output.json)


@app.command()
def plan(
    job: JobFile = None,
    config_mode: Recipe = None,
    sets: Sets = None,
    show_backend_config: Annotated[
        bool, typer.Option("--show-backend-config", help="Instead: what TRL, DeepSpeed or Axolotl will be given.")
    ] = False,
    output: OutputOption = Output.text,
) -> int:
    """Show what a job would do: ranks, batches, memory a rank, checkpoint size. Trains nothing."""
    from nexa_train.cli.check import plan_job, show_backend
    from nexa_train.config.load import load_job

    answer = show_backend if show_backend_config else plan_job
    return answer(load_job(job, recipe=config_mode, sets=sets or ()), as_json=output is Output.json)


@app.command()
def submit(
    job: JobFile = None,
    config_mode: Recipe = None,
    run_name: RunName = None,
    sets: Sets = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="By sbatch; prints the script where there is none.")] = False,
) -> int:
    """Hand a job to a scheduler."""
    from nexa_train.cli.check import submit_job
    from nexa_train.config.load import load_job

    return submit_job(load_job(job, recipe=config_mode, sets=sets or (), name=run_name), slurm=slurm)


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="manifest.json, checkpoint, run or artifacts root; a path or s3://.")],
    output: OutputOption = Output.text,
) -> int:
    """Check every byte of one or many checkpoints against their manifests."""
    from nexa_train.cli.check import verify_uri

    return verify_uri(uri, as_json=output is Output.json)


@app.command()
def version(output: OutputOption = Output.text) -> int:
    """Print the version."""
    from nexa_train.cli.check import print_version

    return print_version(as_json=output is Output.json)
