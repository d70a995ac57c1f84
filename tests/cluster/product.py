"""The product on a real cluster, as a user puts it there: buckets, storage profile, operator by Helm, a job by kubectl.

After `node` and `minio`; the demo and the end-to-end tests are made of these steps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexa_train.data.stdlib import docstring_rows
from tests.cluster.cluster import Cluster
from tests.cluster.minio import MinioServer
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import run, wait_until
from tests.cluster.tools import binary

EXAMPLE = REPOSITORY / "examples" / "job.yaml"
DATA_BUCKET, MODEL_BUCKET, ROWS = "nexa-data", "nexa-models", "docstrings.jsonl"
OPERATOR_NAMESPACE = "nexa-system"


def fill_buckets(minio: MinioServer) -> None:
    """The rows that examples/job.yaml names, and an empty bucket for its checkpoints."""
    for bucket in (DATA_BUCKET, MODEL_BUCKET):
        if not minio.client.bucket_exists(bucket):
            minio.make_bucket(bucket)
    rows = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in docstring_rows()).encode()
    minio.client.put_object(DATA_BUCKET, ROWS, io.BytesIO(rows), len(rows))


def make_storage_profile(cluster: Cluster, minio: MinioServer, *, namespace: str, name: str = "default") -> None:
    """What an administrator gives a namespace: where the store is, and the credentials, which only pods see."""
    secret_keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    env = minio.env()
    objects = [
        {"kind": "ConfigMap", "data": {key: value for key, value in env.items() if key not in secret_keys}},
        {"kind": "Secret", "stringData": {key: env[key] for key in secret_keys}},
    ]
    metadata = {"name": f"nexa-storage-{name}", "namespace": namespace}
    items = [{"apiVersion": "v1", "metadata": metadata, **each} for each in objects]
    cluster.kubectl("apply", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def remove_storage_profile(cluster: Cluster, *, namespace: str, name: str = "default") -> None:
    """Take it back: whoever uses the cluster next makes their own."""
    selected = ("configmap,secret", f"nexa-storage-{name}", f"--namespace={namespace}", "--ignore-not-found")
    cluster.kubectl("delete", *selected)


def manifests(minio: MinioServer, run_id: str) -> list[dict[str, Any]]:
    """Committed ones of a run, oldest first."""
    found = minio.client.list_objects(MODEL_BUCKET, f"checkpoints/{run_id}/", recursive=True)
    keys = sorted(each.object_name or "" for each in found)
    return [json.loads(read_model(minio, key)) for key in keys if key.endswith("/manifest.json")]


def read_model(minio: MinioServer, key: str) -> bytes:
    """An object of the bucket with the checkpoints."""
    answer = minio.client.get_object(MODEL_BUCKET, key)
    try:
        content: bytes = answer.read()
        return content
    finally:
        answer.close()
        answer.release_conn()


def install_operator(cluster: Cluster, *, operator_image: str, trainer_image: str, **values: str | int) -> None:
    """`helm upgrade --install`, and wait until the operator says that it is ready."""
    repository, _, tag = operator_image.rpartition(":")
    chosen: dict[str, str | int] = {
        "image.repository": repository,
        "image.tag": tag,
        "trainerImage": trainer_image,
        **values,
    }
    command: list[str | Path] = [binary("helm"), "upgrade", "--install", "nexa", REPOSITORY / "helm" / "nexa"]
    command += [f"--kubeconfig={cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}", "--create-namespace"]
    command += [f"--set-json={key}={json.dumps(value)}" for key, value in chosen.items()]
    run([*command, "--wait", "--timeout=120s"])


def job_status(cluster: Cluster, name: str, *, namespace: str = "default") -> dict[str, Any]:
    """The status of a NexaTrainingJob; empty before the operator has seen it."""
    found = cluster.kubectl("get", f"ntj/{name}", f"--namespace={namespace}", "--output=json").stdout
    status: dict[str, Any] = json.loads(found).get("status", {})
    return status


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    """One condition of a status; empty where it is not there."""
    return next((each for each in status.get("conditions", []) if each["type"] == kind), {})


def wait_ended(
    cluster: Cluster,
    name: str,
    *,
    namespace: str = "default",
    timeout_seconds: float = 300,
    each: Callable[[dict[str, Any]], None] = lambda status: None,
) -> dict[str, Any]:
    """Wait until the job succeeded or failed; returns its status. `each` sees every status on the way."""

    def ended() -> dict[str, Any] | None:
        status = job_status(cluster, name, namespace=namespace)
        each(status)
        over = [kind for kind in ("Succeeded", "Failed") if condition(status, kind).get("status") == "True"]
        return status if over else None

    def detail() -> str:
        pods = cluster.kubectl("describe", "pods", f"--namespace={namespace}", check=False).stdout
        return json.dumps(job_status(cluster, name, namespace=namespace), indent=1) + pods[-6000:]

    return wait_until(ended, timeout_seconds=timeout_seconds, what=f"job {name} ended", detail=detail)
