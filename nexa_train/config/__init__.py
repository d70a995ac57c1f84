"""The description of a job: schema, loading, identity. Imports no torch and no Kubernetes client."""

from nexa_train.config.job import API_VERSION, GROUP, KIND, PLURAL, VERSION, Job
from nexa_train.config.spec import JobSpec

__all__ = ["API_VERSION", "GROUP", "KIND", "PLURAL", "VERSION", "Job", "JobSpec"]
