"""What a launcher hands its ranks: plain values, through `run.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexa_train.config.job import Job
from nexa_train.config.spec import JobSpec
from nexa_train.data.prepare import Prepared
from nexa_train.models.locate import Located
from nexa_train.plan import Memory, TrainPlan, in_precision
from nexa_train.provenance import processor
from nexa_train.registry import Architecture


@dataclass(frozen=True)
class RankWork:
    """One attempt, ready to run: nothing in it is left to decide.

    Attributes:
        data_folder: see `data.prepare`. dataset, code: facts for the manifest.
    """

    job: Job
    plan: TrainPlan
    located: Located
    data_folder: Path
    dataset: dict[str, Any]
    code: dict[str, Any]
    store_uri: str
    attempt: int

    @property
    def spec(self) -> JobSpec:
        """What the job asks for, in the precision that this machine has."""
        return in_precision(self.job.spec, self.plan.precision)

    @property
    def adapts_microbatch(self) -> bool:
        """Whether another attempt may take fewer sequences at once."""
        training = self.job.spec.training
        chosen = (training.microbatch_size_per_gpu, training.grad_accumulation_steps)
        return self.plan.microbatch > 1 and chosen == ("auto", "auto")

    def world_facts(self) -> dict[str, Any]:
        """The world that these bits hold for."""
        return {
            "ranks": self.plan.world_size,
            "nodes": self.plan.nodes,
            "microbatch": self.plan.microbatch,
            "accumulation": self.plan.accumulation,
            "threads": self.plan.threads,
            "processor": processor(),
            "backend": self.job.spec.backend,
            "precision": self.plan.precision,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        metadata = self.job.metadata.model_dump(mode="json")
        return {
            "job": {"metadata": metadata, "spec": self.job.spec.model_dump(mode="json")},
            "plan": asdict(self.plan),
            "located": {**asdict(self.located), "folder": str(self.located.folder)},
            "data_folder": str(self.data_folder),
            "dataset": self.dataset,
            "code": self.code,
            "store_uri": self.store_uri,
            "attempt": self.attempt,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankWork:
        """What `to_dict` wrote."""
        plan, located = dict(values["plan"]), values["located"]
        memory = plan.pop("memory")
        scratch = Architecture(**located["scratch"]) if located["scratch"] else None
        return cls(
            job=Job.model_validate(values["job"]),
            plan=TrainPlan(**plan, memory=Memory(**memory) if memory else None),
            located=Located(**{**located, "folder": Path(located["folder"]), "scratch": scratch}),
            data_folder=Path(values["data_folder"]),
            dataset=values["dataset"],
            code=values["code"],
            store_uri=values["store_uri"],
            attempt=values["attempt"],
        )


def dataset_facts(job: Job, prepared: Prepared, located: Located) -> dict[str, Any]:
    """The manifest's `dataset` section: what was read, dropped and cut."""
    train = prepared.audit["train"]
    return {
        "uri": prepared.uri,
        "version": job.spec.data.dataset_version,
        "digest": prepared.digest,
        "prepared_key": prepared.key,
        "rows": train.rows,
        "dropped": train.dropped,
        "truncated": train.truncated,
        "base_model": located.origin,
        "audit": {split: asdict(audit) for split, audit in prepared.audit.items()},
    }
