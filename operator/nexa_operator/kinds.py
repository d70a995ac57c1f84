"""Where the API server has objects of each kind. Pure; used by everything that names one."""

from __future__ import annotations

from dataclasses import dataclass

from nexa_train.config import API_VERSION, PLURAL


@dataclass(frozen=True)
class Kind:
    """Where objects of one kind are found."""

    api: str
    plural: str

    @property
    def group(self) -> str:
        """Of the API; empty for the core one."""
        return self.api.removeprefix("/apis/").split("/")[0] if self.api.startswith("/apis/") else ""

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        where = f"{self.api}/namespaces/{namespace}" if namespace else self.api
        return "/".join(part for part in (where, self.plural, name, subresource) if part)


JOBS = Kind("/apis/batch/v1", "jobs")
JOBSETS = Kind("/apis/jobset.x-k8s.io/v1alpha2", "jobsets")
PYTORCHJOBS = Kind("/apis/kubeflow.org/v1", "pytorchjobs")
WORKLOADS = Kind("/apis/kueue.x-k8s.io/v1beta1", "workloads")
PODS = Kind("/api/v1", "pods")
SERVICES = Kind("/api/v1", "services")
EVENTS = Kind("/api/v1", "events")
NODES = Kind("/api/v1", "nodes")
LEASES = Kind("/apis/coordination.k8s.io/v1", "leases")
TRAINING_JOBS = Kind(f"/apis/{API_VERSION}", PLURAL)
