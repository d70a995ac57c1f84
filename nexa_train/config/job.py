"""A whole NexaTrainingJob: metadata and spec, and the identity of the run that it describes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field

from nexa_train.config.base import LabelMap, Strict
from nexa_train.config.spec import JobSpec

GROUP, VERSION, KIND, PLURAL = "train.nexa.dev", "v1alpha1", "NexaTrainingJob", "nexatrainingjobs"
API_VERSION = f"{GROUP}/{VERSION}"

NOT_IDENTITY = ("artifacts", "cluster", "image", "recovery", "schedule", "trackers")
"""Groups that say where and when a run happens, not what it is."""


class Metadata(Strict):
    """The part of Kubernetes' object metadata that a job file carries."""

    name: str = Field(
        max_length=45,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="A DNS label that begins with a letter, as names of Services must.",
    )
    namespace: str = Field("default", max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    labels: LabelMap = Field(default_factory=dict)
    annotations: LabelMap = Field(default_factory=dict)


class Job(Strict):
    """One description of a training job, wherever it runs."""

    metadata: Metadata
    spec: JobSpec

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run: the spec in snake_case without `NOT_IDENTITY` and without defaults.

        A key that a later version adds does not change what the runs of today are.
        """
        return {name: keys for name, keys in self._stated(by_alias=False).items() if name not in NOT_IDENTITY}

    @property
    def run_id(self) -> str:
        """namespace-name-HASH10; equal for equal identities."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        namespace, name = self.metadata.namespace, self.metadata.name
        # Job a-x of team and job x of team-a are two, and must not go on from each other's checkpoints.
        told_apart = f"{canonical}\n{namespace}" if "-" in namespace else canonical
        digest = hashlib.sha256(told_apart.encode()).hexdigest()
        return f"{namespace}-{name}-{digest[:10]}"

    def as_manifest(self) -> dict[str, Any]:
        """The object that `kubectl apply` takes; defaults left out."""
        metadata = self.metadata.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        spec = self._stated(by_alias=True)
        return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}

    def _stated(self, *, by_alias: bool) -> dict[str, Any]:
        """The spec without what equals its default."""
        spec = self.spec.model_dump(mode="json", by_alias=by_alias, exclude_defaults=True)
        # A discriminator equal to its default is still what names the branch.
        for group in ("method", "tuning"):
            if group in spec:
                spec[group]["type"] = getattr(self.spec, group).type
        return spec
