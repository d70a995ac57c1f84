"""The CRD before a real API server: it is accepted, and it refuses what the models refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexa_train.config import KIND, Job, JobSpec
from nexa_train.config.load import load_job, recipe_names
from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("**/*.yaml") if f"kind: {KIND}" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster) -> Cluster:
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(ROOT / "crds"))
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/nexatrainingjobs.train.nexa.dev")
    # The CRD alone is asked here, whichever module installed the chart before.
    ours = "--selector=app.kubernetes.io/name=nexa"
    control_plane.kubectl("delete", "validatingadmissionpolicybinding", ours)
    create = ("create", "--dry-run=server", "--filename=-")
    wait_until(
        lambda: control_plane.kubectl(*create, input=json.dumps(manifest()), check=False).returncode == 0,
        timeout_seconds=30,
        what="no policy speaks any more",
    )
    return control_plane


def manifest(name: str = "job", **spec: Any) -> dict[str, Any]:
    """A small valid job; a keyword replaces a group."""
    return {
        "apiVersion": "train.nexa.dev/v1alpha1",
        "kind": "NexaTrainingJob",
        "metadata": {"name": name},
        "spec": {"data": {"remoteUri": "rows.jsonl"}, **spec},
    }


def server_side(cluster: Cluster, document: dict[str, Any]) -> dict[str, Any]:
    """The object as the server would store it."""
    done = cluster.kubectl(
        "create",
        "--dry-run=server",
        "--validate=strict",
        "--output=json",
        "--filename=-",
        input=json.dumps(document),
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_server_takes_every_example(cluster, path):
    for document in yaml.safe_load_all(path.read_text()):
        if document.get("kind") == KIND:
            server_side(cluster, document)


@pytest.mark.parametrize("name", recipe_names())
def test_the_server_takes_every_shipped_recipe(cluster, name):
    server_side(cluster, load_job(recipe=name).as_manifest())


def test_a_job_of_one_key_gets_the_defaults_of_the_models(cluster):
    stored = server_side(cluster, manifest())["spec"]
    assert JobSpec.model_validate(stored) == JobSpec.model_validate({"data": {"remoteUri": "rows.jsonl"}})
    assert stored["optimizer"]["betas"] == [0.9, 0.999]
    assert stored["training"]["microbatchSizePerGpu"] == "auto"


METHODS = [
    {"method": {"type": "sft"}},
    {"method": {"type": "dpo"}, "data": {"remoteUri": "r", "format": "preference"}},
    {"method": {"type": "distill", "teacher": "big", "temperature": 2}},
    {"method": {"type": "pretrain"}, "data": {"remoteUri": "r", "format": "text"}},
    {"tuning": {"type": "lora", "rank": 16}},
    {"tuning": {"type": "qlora", "rank": 16, "alpha": 32}},
    {"training": {"epochs": 2, "globalBatchSize": 64}, "optimizer": {"lr": 1}},
]


@pytest.mark.parametrize("spec", METHODS, ids=json.dumps)
def test_a_run_keeps_its_identity_through_the_server(cluster, spec):
    document = manifest(**spec)
    stored = server_side(cluster, document)
    assert Job.model_validate({"metadata": {"name": "job"}, "spec": stored["spec"]}).run_id == (
        Job.model_validate({"metadata": {"name": "job"}, "spec": document["spec"]}).run_id
    )


BAD = [
    ({"method": {"type": "rlhf"}}, "spec.method.type"),
    ({"method": {"beta": 0.1}}, "spec.method.type"),
    ({"method": {"type": "sft", "beta": 0.1}}, "spec.method"),
    ({"method": {"type": "distill"}}, "teacher"),
    (
        {"method": {"type": "dpo", "beta": 0}, "data": {"remoteUri": "r", "format": "preference"}},
        "spec.method.beta",
    ),
    ({"tuning": {"type": "lora"}}, "rank"),
    ({"tuning": {"type": "full", "rank": 8}}, "spec.tuning"),
    ({"tuning": {"type": "lora", "rank": 8, "doubleQuant": True}}, "spec.tuning"),
    ({"tuning": {"type": "lora", "rank": 0}}, "spec.tuning.rank"),
    ({"tuning": {"type": "lora", "rank": 8, "dropout": 1}}, "spec.tuning.dropout"),
    ({"backend": "jax"}, "spec.backend"),
    ({"data": {}}, "spec.data.remoteUri"),
    ({"data": {"remoteUri": ""}}, "spec.data.remoteUri"),
    ({"data": {"remoteUri": "r", "format": "preference"}}, "spec.data.format"),
    ({"data": {"remoteUri": "r", "validation": {"fraction": 0.1, "rows": 3}}}, "spec.data.validation"),
    ({"data": {"remoteUri": "r", "validation": {"fraction": 1}}}, "spec.data.validation.fraction"),
    ({"data": {"remoteUri": "r", "columns": {"k" * 400: "v"}}}, "spec.data.columns"),
    ({"cluster": {"resources": {"extended": {"cpu": 1}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"resources": {"extended": {"kubernetes.io/gpu": 1}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"resources": {"extended": {"node.kubernetes.io/gpu": 1}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"resources": {"extended": {"nvidia.com/gpu": 1}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"resources": {"extended": {"rdma/hca": 0}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"gpuResource": "gpu"}}, "spec.cluster.gpuResource"),
    ({"cluster": {"resources": {"extended": {"requests.rdma/hca": 1}}}}, "spec.cluster.resources.extended"),
    ({"cluster": {"gpuResource": "kubernetes.io/gpu"}}, "spec.cluster.gpuResource"),
    ({"cluster": {"gpuResource": "requests.nvidia.com/gpu"}}, "spec.cluster.gpuResource"),
    ({"cluster": {"labels": {"a b": "x"}}}, "spec.cluster.labels"),
    ({"cluster": {"annotations": {"a/b/c": "x"}}}, "spec.cluster.annotations"),
    ({"cluster": {"nodeSelector": {"a..b/c": "x"}}}, "spec.cluster.nodeSelector"),
    ({"cluster": {"tolerations": [{"key": "a/b/c"}]}}, "spec.cluster.tolerations[0].key"),
    ({"cluster": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}}, "tolerations[0].value"),
    ({"cluster": {"tolerations": [{"value": "b"}]}}, "spec.cluster.tolerations[0].operator"),
    ({"schedule": {"queueName": "q" * 64}}, "spec.schedule.queueName"),
    ({"schedule": {"priority": "a..b"}}, "spec.schedule.priority"),
    ({"model": {"dModel": 64}}, "spec.model.dModel"),
    ({"model": {"dModel": 60, "nLayers": 2, "nHeads": 4}}, "spec.model.dModel"),
    ({"model": {"name": "x" * 1025}}, "spec.model.name"),
    ({"training": {"maxSteps": 5, "epochs": 1}}, "spec.training.epochs"),
    ({"training": {"maxSteps": 0}}, "spec.training.maxSteps"),
    ({"training": {"microbatchSizePerGpu": "many"}}, "spec.training.microbatchSizePerGpu"),
    ({"training": {"microbatchSizePerGpu": 0}}, "spec.training.microbatchSizePerGpu"),
    ({"training": {"globalBatchSize": 8, "microbatchSizePerGpu": 3}}, "spec.training.microbatchSizePerGpu"),
    (
        {"training": {"globalBatchSize": 8, "microbatchSizePerGpu": 2, "gradAccumulationSteps": 2}},
        "spec.training.gradAccumulationSteps",
    ),
    ({"training": {"globalBatchSize": 8}, "cluster": {"numNodes": 3}}, "spec.training.globalBatchSize"),
    ({"training": {"globalBatchSize": 8}, "cluster": {"gpusPerNode": 3}}, "spec.training.globalBatchSize"),
    ({"optimizer": {"lr": 0}}, "spec.optimizer.lr"),
    ({"optimizer": {"betas": [0.9]}}, "spec.optimizer.betas"),
    ({"cluster": {"numNodes": 2, "minNodes": 3}}, "spec.cluster.minNodes"),
    ({"cluster": {"resources": {"cpu": "lots"}}}, "spec.cluster.resources.cpu"),
    ({"cluster": {"resources": {"cpu": "0m"}}}, "spec.cluster.resources.cpu"),
    ({"cluster": {"resources": {"memory": "0.0Gi"}}}, "spec.cluster.resources.memory"),
    ({"cluster": {"env": [{"name": "not ok"}]}}, "spec.cluster.env[0].name"),
    ({"cluster": {"volumes": [{"name": "v", "mountPath": "/v"}]}}, "spec.cluster.volumes[0]"),
    (
        {"cluster": {"volumes": [{"name": "v", "mountPath": "/v", "claim": "c", "configMap": "m"}]}},
        "spec.cluster.volumes[0]",
    ),
    ({"cluster": {"env": [{"name": "NEXA_ATTEMPT", "value": "9"}]}}, "spec.cluster.env[0].name"),
    ({"cluster": {"env": [{"name": "JOB_COMPLETION_INDEX", "value": "9"}]}}, "spec.cluster.env[0].name"),
    ({"cluster": {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}}, "spec.cluster.env[0].name"),
    ({"cluster": {"env": [{"name": "NVIDIA_MIG_MONITOR_DEVICES", "value": "all"}]}}, "spec.cluster.env[0].name"),
    ({"cluster": {"volumes": [{"name": "nexa-tmp", "mountPath": "/v", "claim": "c"}]}}, "spec.cluster.volumes[0].name"),
    ({"cluster": {"volumes": [{"name": "v", "mountPath": "/tmp/nexa_train", "configMap": "m"}]}}, "mountPath"),
    ({"cluster": {"volumes": [{"name": "v", "mountPath": "/rows/../usr", "configMap": "m"}]}}, "mountPath"),
    ({"cluster": {"volumes": [{"name": "v", "mountPath": "/v", "configMap": "../other"}]}}, "configMap"),
    (
        {"cluster": {"volumes": [{"name": name, "mountPath": "/v", "claim": "c"} for name in "ab"]}},
        "spec.cluster.volumes",
    ),
    (
        {"cluster": {"volumes": [{"name": "v", "mountPath": path, "claim": "c"} for path in ("/a", "/b")]}},
        "spec.cluster.volumes",
    ),
    ({"cluster": {"labels": {"train.nexa.dev/job-uid": "another's"}}}, "spec.cluster.labels"),
    ({"cluster": {"labels": {"job-name": "another"}}}, "spec.cluster.labels"),
    ({"cluster": {"labels": {"team": "not a label"}}}, "spec.cluster.labels"),
    (
        {"cluster": {"annotations": {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}}},
        "spec.cluster.annotations",
    ),
    ({"artifacts": {"uri": "s3://m", "storage": "team/../default"}}, "spec.artifacts.storage"),
    ({"image": "trainer:1 --privileged"}, "spec.image"),
    ({"schedule": {"priority": "High"}}, "spec.schedule.priority"),
    ({"recovery": {"rules": [{"exitCodes": [], "action": "retry"}]}}, "spec.recovery.rules[0]"),
    ({"trackers": ["a-notebook"]}, "spec.trackers[0]"),
]


@pytest.mark.parametrize(("spec", "field"), BAD, ids=[json.dumps(spec)[:70] for spec, _ in BAD])
def test_the_server_refuses_what_the_models_refuse_and_names_the_field(cluster, spec, field):
    document = manifest(**spec)
    with pytest.raises(ValueError, match="validation error"):
        Job.model_validate({"metadata": {"name": "job"}, "spec": document["spec"]})
    refused = cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(document), check=False)
    assert refused.returncode
    assert "is invalid" in refused.stderr, "422, not another kind of failure"
    assert field in refused.stderr


def test_a_name_longer_than_45_characters_is_refused_because_pods_are_named_after_it(cluster):
    server_side(cluster, manifest("n" * 45))
    with pytest.raises(Exception, match="at most 45 characters"):
        server_side(cluster, manifest("n" * 46))
    for name in ("a.b", "7b"):  # a Service's name begins with a letter
        with pytest.raises(Exception, match="DNS label"):
            server_side(cluster, manifest(name))


def test_an_unknown_key_is_refused_under_strict_validation(cluster):
    with pytest.raises(Exception, match="unknown field"):
        server_side(cluster, manifest(training={"globalBatchSizee": 8}))


RICH: dict[str, Any] = {
    "data": {"remoteUri": "rows.jsonl", "columns": {"messages": "chat"}},
    "cluster": {"numNodes": 2, "nodeSelector": {"disk": "ssd"}, "env": [{"name": "A", "value": "b"}]},
    "training": {"globalBatchSize": 12, "maxSteps": 10},
    "artifacts": {"uri": "s3://models", "keepLast": 3},
}


@pytest.fixture(scope="module")
def created(cluster: Cluster) -> dict[str, Any]:
    document = manifest("immutable", **copy.deepcopy(RICH))
    cluster.kubectl("delete", "ntj/immutable", "--ignore-not-found", "--wait")
    cluster.kubectl("create", "--filename=-", input=json.dumps(document))
    return document


def patch(cluster: Cluster, change: dict[str, Any], name: str = "immutable") -> str:
    """What the server says to a merge patch; empty when it agrees."""
    arguments = (
        "patch",
        f"ntj/{name}",
        "--type=merge",
        "--dry-run=server",
        f"--patch={json.dumps({'spec': change})}",
    )
    return cluster.kubectl(*arguments, check=False).stderr


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": {"name": "other"}}, "spec.model"),
        ({"data": {"columns": {"messages": "other"}}}, "spec.data"),
        ({"method": {"trainOn": "all"}}, "spec.method"),
        ({"tuning": {"type": "lora", "rank": 4}}, "spec.tuning"),
        ({"backend": "hf"}, "spec.backend"),
        ({"training": {"maxSteps": 11}}, "spec.training"),
        ({"training": {"maxSteps": None}}, "spec.training"),
        ({"optimizer": {"lr": 1e-3}}, "spec.optimizer"),
        ({"artifacts": {"keepLast": 1}}, "spec.artifacts"),
        ({"recovery": {"maxRestarts": 9}}, "spec.recovery"),
        ({"image": "another"}, "spec.image"),
        ({"cluster": {"env": []}}, "spec.cluster.env"),
        ({"cluster": {"nodeSelector": {"disk": None}}}, "spec.cluster.nodeSelector"),
        ({"cluster": {"numNodes": 4}}, "spec.cluster.numNodes"),
        ({"schedule": {"queueName": "q"}}, "spec.schedule.queueName"),
        ({"schedule": {"ttlSecondsAfterFinished": 1}}, "spec.schedule.ttlSecondsAfterFinished"),
        ({"schedule": {"priority": "high"}}, "spec.schedule.priority"),
        ({"schedule": {"activeDeadlineSeconds": 1}}, "spec.schedule.activeDeadlineSeconds"),
        ({"trackers": ["mlflow"]}, "spec.trackers"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_a_run_is_cannot_be_changed_after_creation(cluster, created, change, field):
    said = patch(cluster, change)
    assert "is invalid" in said
    assert field in said


def test_suspending_is_allowed_at_any_time(cluster, created):
    assert patch(cluster, {"schedule": {"suspend": True}}) == ""


@pytest.fixture(scope="module")
def suspended(cluster: Cluster) -> str:
    document = manifest("suspended", **copy.deepcopy(RICH), schedule={"suspend": True})
    cluster.kubectl("delete", "ntj/suspended", "--ignore-not-found", "--wait")
    cluster.kubectl("create", "--filename=-", input=json.dumps(document))
    return "suspended"


def test_a_suspended_job_may_be_resized_and_resumed(cluster, suspended):
    assert patch(cluster, {"cluster": {"numNodes": 4}}, suspended) == ""
    assert patch(cluster, {"schedule": {"suspend": False}}, suspended) == ""


def test_a_job_that_is_not_suspended_before_and_after_is_not_resized(cluster, created, suspended):
    resized = {"cluster": {"numNodes": 4}}
    assert "before and after" in patch(cluster, {"schedule": {"suspend": True}, **resized})
    assert "before and after" in patch(cluster, {"schedule": {"suspend": False}, **resized}, suspended)


def test_a_resize_is_checked_against_the_batch_as_at_creation(cluster, suspended):
    assert "globalBatchSize" in patch(cluster, {"cluster": {"numNodes": 5}}, suspended)
