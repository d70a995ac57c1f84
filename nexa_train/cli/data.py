"""A job's data, checked without training: `nexa validate --data` and `train.py --dry-run`."""

from __future__ import annotations

from nexa_train.config import Job
from nexa_train.data.prepare import prepare
from nexa_train.data.read import read_splits
from nexa_train.data.render import check_rows
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.errors import NotFoundError
from nexa_train.models.locate import check_model, locate


def check_data(job: Job) -> tuple[str, ...]:
    """Prepare a job's data as a run would; where its tokenizer is not here, check that every row can be read.

    Returns:
        What a person should know of it, a line each.

    Raises:
        NexaError: the data or the model cannot be trained on.
    """
    spec = job.spec
    try:
        located = locate(spec.model)
    except NotFoundError as exc:
        raws = [raw for raw in read_splits(spec.data) if raw]
        for raw in raws:
            check_rows(raw.rows(), spec.data)
        return (f"data: {sum(raw.num_rows for raw in raws)} rows can be read; not tokenised, because: {exc}",)
    tokenizer = load_tokenizer(located.folder)
    check_model(located, spec, tokenizer)
    return prepare(spec, tokenizer).notes
