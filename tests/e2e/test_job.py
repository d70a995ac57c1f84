"""The whole way: Helm installs the operator, kubectl applies a job, pods train it, MinIO holds what came out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import ExternalCluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import start_jobset, start_training_operator
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster
from tests.cluster.paths import REPOSITORY
from tests.cluster.process import Process
from tests.cluster.product import (
    EXAMPLE,
    condition,
    fill_buckets,
    job_status,
    manifests,
    remove_storage_profile,
    wait_ended,
)
from tests.cluster.run import wait_until
from tests.cluster.tools import binary
from tests.readme import commands

pytestmark = pytest.mark.e2e

AnyCluster = RealCluster | ExternalCluster


class Product:
    """A cluster with the operator in it, a store beside it, and the ways of a user."""

    def __init__(self, cluster: AnyCluster, minio: MinioServer, images: dict[str, str]) -> None:
        self.cluster, self.minio, self.images = cluster, minio, images

    def apply(self, document: dict[str, Any]) -> str:
        self.cluster.kubectl("apply", "--filename=-", input=json.dumps(document))
        return str(document["metadata"]["name"])

    def nexa(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line on this machine, with the store's credentials."""
        environment = {**os.environ, **self.minio.env()}
        command = [sys.executable, "-m", "nexa_train", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)

    def pods(self, job: str) -> list[dict[str, Any]]:
        selector = f"--selector=train.nexa.dev/job-name={job}"
        items: list[dict[str, Any]] = json.loads(self.cluster.kubectl("get", "pods", selector, "--output=json").stdout)[
            "items"
        ]
        return items

    def events(self, job: str) -> list[str]:
        selector = f"--field-selector=involvedObject.name={job}"
        found = json.loads(self.cluster.kubectl("get", "events", selector, "--output=json").stdout)["items"]
        return [event["reason"] for event in found]

    def shell(self, command: str) -> None:
        """One command of the README."""
        programs = {binary(program).parent for program in ("helm", "kubectl")}
        own = {"KUBECONFIG": str(self.cluster.kubeconfig), **self.images, **self.minio.env()}
        own["PATH"] = ":".join([*map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, **own},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def product(
    real_cluster: AnyCluster, cluster_minio: MinioServer, operator_image: str, trainer_image: str
) -> Iterator[Product]:
    """Installed once for this file, as the README says."""
    fill_buckets(cluster_minio)
    repository, _, tag = operator_image.rpartition(":")
    images = {"OPERATOR_REPOSITORY": repository, "OPERATOR_TAG": tag, "TRAINER_IMAGE": trainer_image}
    product = Product(real_cluster, cluster_minio, images)
    for command in commands("On a cluster")[:3]:
        product.shell(command)
    yield product
    real_cluster.kubectl("delete", "ntj", "--all", "--wait=true", "--timeout=60s", check=False)
    remove_storage_profile(real_cluster, namespace="default")


def example(name: str | None = None, **groups: dict[str, Any] | str) -> dict[str, Any]:
    """examples/job.yaml, perhaps under another name and with some keys changed."""
    document: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    document["metadata"]["name"] = name or document["metadata"]["name"]
    for group, keys in groups.items():
        document["spec"][group] = {**document["spec"][group], **keys} if isinstance(keys, dict) else keys
    return document


@pytest.fixture(scope="module")
def trained(product: Product) -> dict[str, Any]:
    """The status of examples/job.yaml, applied and ended, with every status on the way."""
    seen: list[dict[str, Any]] = []
    apply, *afterwards = commands("On a cluster")[3:]
    product.shell(apply)
    status = wait_ended(product.cluster, "two-ranks", each=seen.append)
    for command in afterwards:
        product.shell(command)
    return {**status, "seen": seen}


def test_two_pods_train_the_example_and_the_job_succeeds(product: Product, trained: dict[str, Any]) -> None:
    assert condition(trained, "Succeeded")["status"] == "True", trained
    assert (trained["step"], trained["totalSteps"], trained["phase"]) == (40, 40, "Succeeded")
    assert trained["checkpoint"]["step"] == 40
    assert trained["checkpoint"]["uri"].startswith("s3://nexa-models/checkpoints/default-two-ranks-")
    assert sorted(pod["metadata"]["name"].rsplit("-", 1)[0] for pod in product.pods("two-ranks")) == [
        "two-ranks-a0-0",
        "two-ranks-a0-1",
    ]


def test_status_was_told_while_it_trained(trained: dict[str, Any]) -> None:
    assert any(condition(status, "Running").get("status") == "True" for status in trained["seen"])


def test_the_checkpoints_are_in_the_store_and_verify(product: Product, trained: dict[str, Any]) -> None:
    done = product.nexa("verify", trained["checkpoint"]["uri"], "-o", "json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert report["ok"]
    assert report["manifests"][0]["digest"] == trained["checkpoint"]["digest"]
    whole_run = json.loads(product.nexa("verify", "s3://nexa-models", "-o", "json").stdout)
    assert {10, 20, 30, 40} <= {each["step"] for each in whole_run["manifests"]}


def test_the_same_file_run_on_this_machine_ends_with_the_same_weights(
    product: Product, trained: dict[str, Any], tmp_path: Path
) -> None:
    done = product.nexa("run", str(EXAMPLE), "--set", f"artifacts.uri={tmp_path}", "-o", "json")
    outcome = json.loads(done.stdout)
    assert outcome["exit_code"] == 0, done.stderr
    assert outcome["run_id"] == trained["runId"]
    assert outcome["checkpoint"]["weights_digest"] == trained["checkpoint"]["weightsDigest"]


@pytest.mark.parametrize(("runtime", "start"), [("jobset", start_jobset), ("pytorchjob", start_training_operator)])
def test_ranks_find_each_other_on_every_runtime_and_train_to_the_same_weights(
    product: Product, trained: dict[str, Any], runtime: str, start: Callable[[ControlPlane], Process]
) -> None:
    if not isinstance(product.cluster, ControlPlane):
        pytest.skip("other runtimes are started only in a cluster that the tests start; unset NEXA_TEST_KUBECONFIG")
    start(product.cluster)
    document = example(f"on-{runtime}")
    document["spec"]["schedule"] = {"runtime": runtime}
    status = wait_ended(product.cluster, product.apply(document))
    assert condition(status, "Succeeded")["status"] == "True", status
    assert (status["attempt"], status["checkpoint"]["step"]) == (0, 40)
    assert status["checkpoint"]["weightsDigest"] == trained["checkpoint"]["weightsDigest"]


@pytest.fixture
def claim(product: Product, tmp_path: Path) -> Iterator[str]:
    """Of a folder of the node's, which any number of pods may write to."""
    tmp_path.chmod(0o777)
    name, modes = "shared-artifacts", ["ReadWriteMany"]
    size = {"storage": "1Gi"}
    volume = {"capacity": size, "accessModes": modes, "hostPath": {"path": str(tmp_path)}, "storageClassName": ""}
    claim = {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": name}
    for kind, spec in (("PersistentVolume", volume), ("PersistentVolumeClaim", claim)):
        product.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
    yield name
    product.cluster.kubectl("delete", f"pvc/{name}", f"pv/{name}", "--wait=false")


def test_ranks_that_share_a_folder_find_each_other_by_name_and_train_to_the_same_weights(
    product: Product, trained: dict[str, Any], claim: str, tmp_path: Path
) -> None:
    document = example("in-a-folder")
    document["spec"]["artifacts"] = {"uri": "/mnt/artifacts", "storage": "default"}
    volume = {"name": "artifacts", "mountPath": "/mnt/artifacts", "claim": claim, "readOnly": False}
    document["spec"]["cluster"]["volumes"] = [volume]
    status = wait_ended(product.cluster, product.apply(document))
    assert condition(status, "Succeeded")["status"] == "True", status
    assert status["checkpoint"]["weightsDigest"] == trained["checkpoint"]["weightsDigest"]
    assert product.nexa("verify", str(tmp_path)).returncode == 0
    product.cluster.kubectl("delete", "ntj/in-a-folder", "--wait=true")


def test_the_trainers_pods_hold_no_credentials_of_the_cluster(product: Product, trained: dict[str, Any]) -> None:
    for pod in product.pods("two-ranks"):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume]


def test_secrets_of_the_store_appear_in_no_object_status_or_log(product: Product, trained: dict[str, Any]) -> None:
    objects = product.cluster.kubectl(
        "get", "ntj,jobs,pods,services,events", "--all-namespaces", "--output=yaml"
    ).stdout
    logs = "".join(product.cluster.kubectl("logs", pod["metadata"]["name"]).stdout for pod in product.pods("two-ranks"))
    logs += product.cluster.kubectl("logs", "--namespace=nexa-system", "deployment/nexa").stdout
    assert logs
    for credential in (product.minio.secret_key, product.minio.access_key):
        assert credential not in objects + logs


def test_a_job_of_one_step_reports_its_step_and_digest_and_takes_its_artifacts_along(product: Product) -> None:
    document = example("one-step", training={"maxSteps": 1}, cluster={"numNodes": 1}, data={"validation": {"rows": 2}})
    document["spec"]["schedule"] = {"deletionPolicy": "Delete"}
    name = product.apply(document)
    status = wait_ended(product.cluster, name)
    assert condition(status, "Succeeded")["status"] == "True", status
    assert status["step"] == 1
    assert len(status["checkpoint"]["digest"]) == 64
    assert status["goodput"]["productiveSeconds"] > 0

    def kept() -> list[str]:
        found = product.minio.client.list_objects("nexa-models", f"checkpoints/{status['runId']}/", recursive=True)
        return [item.object_name for item in found]

    assert kept()
    product.cluster.kubectl("delete", f"ntj/{name}", "--wait=true", "--timeout=120s")
    assert kept() == []
    assert "ArtifactsRemoved" in product.events(name)


def test_a_missing_data_file_fails_the_job_at_once_and_says_which(product: Product) -> None:
    name = product.apply(example("no-data", data={"remoteUri": "s3://nexa-data/absent.jsonl"}))
    status = wait_ended(product.cluster, name)
    failed = condition(status, "Failed")
    assert failed["status"] == "True"
    assert "absent.jsonl" in failed["message"]
    assert status.get("attempt", 0) == 0
    assert not list(product.minio.client.list_objects("nexa-models", "checkpoints/default-no-data"))


def test_a_trainer_that_dies_before_it_can_speak_is_told_by_the_end_of_its_log(product: Product) -> None:
    broken = [{"name": "PYTHONHASHSEED", "value": "none"}]
    document = example("speechless", cluster={"numNodes": 1, "env": broken})
    document["spec"]["recovery"] = {"maxRestarts": 0}
    status = wait_ended(product.cluster, product.apply(document))
    assert (status["lastFailure"]["cause"], status["lastFailure"]["exitCode"]) == ("Killed", 1)
    assert "PYTHONHASHSEED must be" in status["lastFailure"]["message"], status["lastFailure"]


def test_a_missing_storage_profile_is_said_in_the_kubelet_s_words(product: Product) -> None:
    absent = {"storage": "absent"}
    name = product.apply(example("no-profile", artifacts=absent, data=absent))

    def queued() -> dict[str, Any] | None:
        seen = condition(job_status(product.cluster, name), "Queued")
        return seen if seen.get("reason") == "StorageProfileMissing" else None

    assert '"nexa-storage-absent" not found' in wait_until(queued, timeout_seconds=60, what="it is said")["message"]
    product.cluster.kubectl("delete", f"ntj/{name}")


@pytest.mark.parametrize("backend", ["fsdp", "hf", "deepspeed"])
def test_a_killed_pod_costs_one_attempt_and_no_bit(product: Product, tmp_path: Path, backend: str) -> None:
    steps = {"maxSteps": 60, "saveEverySteps": 10}
    document = example(f"killed-{backend}", backend=backend, training=steps)
    name = product.apply(document)

    def checkpointed() -> bool:
        return job_status(product.cluster, name).get("checkpoint", {}).get("step", 0) >= 10

    wait_until(checkpointed, timeout_seconds=120, what="a checkpoint in the status")
    victim = product.pods(name)[1]["metadata"]["name"]
    product.cluster.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    seen: list[dict[str, Any]] = []
    status = wait_ended(product.cluster, name, each=seen.append)
    assert condition(status, "Succeeded")["status"] == "True", status
    assert status["attempt"] == 1
    on_the_way = [each for each in seen if 0 < each.get("step", 0) < 60 and each.get("etaSeconds")]
    assert on_the_way, "neither step nor ETA was told while it trained"
    assert all(each["loss"] > 0 and each["progress"] == f"{each['step']}/60" for each in on_the_way)
    assert product.nexa("verify", status["checkpoint"]["uri"]).returncode == 0
    job = tmp_path / "job.json"
    job.write_text(json.dumps(document))
    outcome = json.loads(
        product.nexa("run", str(job), "--set", f"artifacts.uri={tmp_path}/artifacts", "-o", "json").stdout
    )
    assert outcome["checkpoint"]["weights_digest"] == status["checkpoint"]["weightsDigest"]


@pytest.fixture
def in_the_way(product: Product) -> Iterator[Callable[[], None]]:
    """A pod that leaves room for one rank of the example; called, it goes."""
    name = "in-the-way"
    container = {
        "name": name,
        "image": product.images["TRAINER_IMAGE"],
        "command": ["sleep", "infinity"],
        "resources": {"requests": {"cpu": example()["spec"]["cluster"]["resources"]["cpu"]}},
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
    product.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
    product.cluster.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s")
    go = lambda: product.cluster.kubectl("delete", f"pod/{name}", "--ignore-not-found") and None  # noqa: E731
    yield go
    go()


def test_a_job_goes_on_with_the_pod_that_found_room_and_with_all_when_others_do(
    product: Product, in_the_way: Callable[[], None], tmp_path: Path
) -> None:
    document = example(
        "elastic",
        model={"dModel": 64, "nLayers": 2, "nHeads": 2},
        data={"validation": {"rows": 8}},
        training={"globalBatchSize": 8, "maxSteps": 300, "saveEverySteps": 50},
        cluster={"minNodes": 1, "shrinkAfterSeconds": 5},
    )
    name = product.apply(document)
    wait_until(lambda: job_status(product.cluster, name).get("step", 0) >= 5, timeout_seconds=120, what="some steps")
    assert job_status(product.cluster, name)["numNodes"] == 1
    in_the_way()
    status = wait_ended(product.cluster, name)
    assert condition(status, "Succeeded")["status"] == "True", status
    assert (status["attempt"], status["numNodes"], status["restarts"]) == (2, 2, 0)
    written = manifests(product.minio, status["runId"])
    worlds = [each["world"]["nodes"] for each in written]
    assert worlds == sorted(worlds)
    assert set(worlds) == {1, 2}
    steps_taken = [entry["step"] for each in written for entry in each["logs"]]
    assert steps_taken == list(range(1, 301)), "none twice, none left out"
    job = tmp_path / "job.json"
    job.write_text(json.dumps(document))
    done = product.nexa("run", str(job), "--set", f"artifacts.uri={tmp_path}/artifacts", "-o", "json")
    outcome = json.loads(done.stdout)
    assert outcome["validation_loss"] == pytest.approx(status["validationLoss"], rel=1e-3), "as with two all the time"


def test_pods_without_memory_for_so_many_sequences_go_on_with_fewer(product: Product) -> None:
    """The limit is the namespace's, of which the estimate knows nothing.

    With cgroup v1 the kernel kills the rank alone, and its launcher goes on; with v2 the whole container.
    """
    texts = [" ".join(str(number * factor) for factor in range(1, 400)) for number in range(65)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    product.minio.client.put_object("nexa-data", "long.jsonl", io.BytesIO(rows), len(rows))
    limited = {"type": "Container", "default": {"memory": "1Gi"}, "defaultRequest": {"memory": "1Gi"}}
    product.apply(
        {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "tight"}, "spec": {"limits": [limited]}}
    )
    try:
        document = example("starved")
        document["spec"] |= {
            "method": {"type": "pretrain"},
            "model": {"name": "tiny", "dModel": 128, "nLayers": 4, "nHeads": 4, "maxSeqLen": 512},
            "data": {"remoteUri": "s3://nexa-data/long.jsonl", "format": "text", "validation": {"rows": 1}},
            "training": {"globalBatchSize": 64, "maxSteps": 2, "saveEverySteps": 1},
            "optimizer": {"name": "adamw", "lr": 0.003},
            "cluster": {"threadsPerRank": 1},
        }
        name = product.apply(document)
        status = wait_ended(product.cluster, name)
    finally:
        product.cluster.kubectl("delete", "limitrange/tight")
    assert condition(status, "Succeeded")["status"] == "True", status
    assert status.get("lastFailure", {}).get("cause") == ("OOMKilled" if status["restarts"] else None)
    world = manifests(product.minio, status["runId"])[-1]["world"]
    assert world["microbatch"] * world["accumulation"] == 64
    assert world["microbatch"] < 64


def test_a_suspended_job_commits_its_last_step_and_goes_on_with_another_number_of_pods(product: Product) -> None:
    name = product.apply(example("resized", training={"maxSteps": 120, "saveEverySteps": 1000}))
    wait_until(
        lambda: job_status(product.cluster, name).get("step", 0) >= 5,
        timeout_seconds=120,
        what="some steps in the status",
    )
    patch(product, name, {"schedule": {"suspend": True}})
    wait_until(lambda: not product.pods(name), timeout_seconds=120, what="its pods are gone")
    run = f"s3://nexa-models/checkpoints/{job_status(product.cluster, name)['runId']}"
    (stopped,) = json.loads(product.nexa("verify", run, "-o", "json").stdout)["manifests"]
    assert 5 <= stopped["step"] < 120
    patch(product, name, {"schedule": {"suspend": True}, "cluster": {"numNodes": 1}})
    patch(product, name, {"schedule": {"suspend": False}})
    status = wait_ended(product.cluster, name)
    assert condition(status, "Succeeded")["status"] == "True", status
    assert (status["attempt"], status["numNodes"], status["restarts"]) == (1, 1, 0)
    whole = json.loads(product.nexa("verify", run, "-o", "json").stdout)
    assert [each["step"] for each in whole["manifests"]] == [stopped["step"], 120]
    spent = status["goodput"]
    assert spent.get("lostSeconds", 0) == 0
    assert spent["productiveSeconds"] > 0
    assert spent["suspendedSeconds"] > 0


def patch(product: Product, name: str, spec: dict[str, Any]) -> None:
    product.cluster.kubectl("patch", f"ntj/{name}", "--type=merge", f"--patch={json.dumps({'spec': spec})}")


def test_deleting_the_job_deletes_its_objects(product: Product, trained: dict[str, Any]) -> None:
    product.cluster.kubectl("delete", "ntj/two-ranks", "--wait=true")
    selector = "--selector=train.nexa.dev/job-name=two-ranks"
    wait_until(
        lambda: "No resources" in product.cluster.kubectl("get", "jobs,services,pods", selector).stderr,
        timeout_seconds=60,
        what="nothing of the job is left",
    )
