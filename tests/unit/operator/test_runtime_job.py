"""RunPlan -> indexed Job, and a Service where one is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from nexa_operator.errors import RuntimeUnavailableError
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import job as runtime
from nexa_train.config import Job
from nexa_train.config.job import Metadata
from tests.unit.operator.builders import UID, job

DEFAULTS = Defaults(image="trainer:1", storage="")
FOLDER = {"artifacts": {"uri": "/mnt/shared"}}


def made(*, attempt: int = 0, defaults: Defaults = DEFAULTS, **groups: Any) -> dict[str, Any]:
    return runtime.gang(make_plan(job(**groups), owner_uid=UID, attempt=attempt, defaults=defaults))


def pod_of(**groups: Any) -> dict[str, Any]:
    return made(**groups)["spec"]["template"]["spec"]


def container_of(**groups: Any) -> dict[str, Any]:
    (container,) = pod_of(**groups)["containers"]
    return container


def environment_of(**groups: Any) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container_of(**groups)["env"] if "value" in item}


def fields_of(**groups: Any) -> dict[str, str]:
    items = [item for item in container_of(**groups)["env"] if "valueFrom" in item]
    return {item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"] for item in items}


def test_the_gang_lives_and_dies_as_one():
    spec = made()["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "TerminatingOrFailed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert not {"podFailurePolicy", "backoffLimitPerIndex", "activeDeadlineSeconds"} & set(spec)


def test_a_queue_s_gang_gets_no_pod_in_place_of_one_that_still_commits():
    assert made(schedule={"queueName": "team"})["spec"]["podReplacementPolicy"] == "Failed"


def test_a_job_on_axolotl_runs_the_image_that_has_it():
    heavy = Defaults(image="trainer:1", heavy_image="heavy:1")
    for defaults, groups, image in (
        (heavy, {}, "trainer:1"),
        (heavy, {"backend": "axolotl"}, "heavy:1"),
        (DEFAULTS, {"backend": "axolotl", "image": "own:1"}, "own:1"),
    ):
        (container,) = made(defaults=defaults, **groups)["spec"]["template"]["spec"]["containers"]
        assert container["image"] == image


def test_a_job_on_axolotl_without_an_image_is_refused_with_what_would_help():
    with pytest.raises(RuntimeUnavailableError, match=r"name one in spec\.image, or .* trainerHeavyImage"):
        made(backend="axolotl")


def test_a_plan_is_the_same_every_time():
    assert json.dumps(made()) == json.dumps(made())


def test_both_children_are_owned_by_the_job_and_block_nothing():
    plan = make_plan(job(**FOLDER), owner_uid=UID, attempt=0, defaults=DEFAULTS)
    (_, service), (_, gang) = runtime.objects(plan)
    for child in (service, gang):
        (reference,) = child["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"], reference["blockOwnerDeletion"]) == (UID, True, False)


def test_the_service_finds_the_pods_of_every_attempt_before_they_are_ready():
    plan = make_plan(job(**FOLDER), owner_uid=UID, attempt=4, defaults=DEFAULTS)
    (_, service), (_, gang) = runtime.objects(plan)
    labels = gang["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert "train.nexa.dev/attempt" not in service["spec"]["selector"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert gang["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


@pytest.mark.parametrize(
    ("groups", "service", "fields"),
    [
        ({}, False, True),
        ({"cluster": {"num_nodes": 1}}, False, False),
        (FOLDER, True, False),
        ({**FOLDER, "cluster": {"num_nodes": 1}}, False, False),
        ({"schedule": {"queue_name": "team"}}, True, False),
    ],
    ids=["a bucket", "one pod", "a folder", "one pod with a folder", "a queue, which may start a gang twice"],
)
def test_pods_have_names_where_they_cannot_meet_in_the_store(groups, service, fields):
    objects = runtime.objects(make_plan(job(**groups), owner_uid=UID, attempt=0, defaults=DEFAULTS))
    assert [kind.plural for kind, _ in objects] == ["services", "jobs"][not service :]
    assert ("NEXA_RDZV_ENDPOINT" in environment_of(**groups)) is ("subdomain" in pod_of(**groups)) is service
    meeting = {
        "NEXA_NODE_ADDRESS": "status.podIP",
        "NEXA_GANG": "metadata.labels['batch.kubernetes.io/controller-uid']",
    }
    assert fields_of(**groups) == (meeting if fields else {})


def test_the_protocol_s_variables_say_what_the_trainer_needs():
    environment = environment_of(**FOLDER)
    assert environment["NEXA_ATTEMPT"] == "0"
    assert environment["NEXA_NUM_NODES"] == "2"
    assert environment["NEXA_IMAGE"] == "trainer:1"
    assert environment["NEXA_RDZV_ENDPOINT"] == "demo-a0-0.demo-ranks.team:29500"


@pytest.mark.parametrize(
    "groups",
    [{}, {"tuning": {"type": "lora", "rank": 8}}, {"method": {"type": "pretrain"}, "optimizer": {"lr": 1e-8}}],
)
def test_the_trainer_derives_the_same_run_id_from_what_it_is_given(groups):
    document = json.loads(environment_of(**groups)["NEXA_JOB"])
    assert Job.model_validate(document).run_id == job(**groups).run_id


def test_a_user_s_variables_stand_beside_the_protocol_s_and_none_twice():
    mine = [{"name": "NEXA_CACHE", "value": "/c"}, {"name": "HOME", "value": "/mine"}, {"name": "HOME", "value": "/h"}]
    environment = environment_of(cluster={"env": mine})
    assert (environment["NEXA_ATTEMPT"], environment["HOME"], environment["NEXA_CACHE"]) == ("0", "/h", "/c")
    names = [item["name"] for item in container_of(cluster={"env": mine})["env"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("asks", [{"gpusPerNode": 1}, {"resources": {"extended": {"nvidia.com/gpu.shared": 1}}}])
def test_where_no_device_is_asked_for_none_comes_by_what_the_image_says(asks):
    batch = {"globalBatchSize": 8}
    assert environment_of(training=batch)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment_of(cluster=asks, training=batch), "the device plugin says which"


@pytest.mark.parametrize(
    "asks", [{"resources": {"extended": {"rdma/hca": 1}}}, {"gpusPerNode": 1, "gpuResource": "volcano.sh/vgpu-number"}]
)
def test_other_devices_bring_no_gpu_but_those_that_the_administrator_names(asks):
    asked = {"cluster": asks, "training": {"globalBatchSize": 8}}
    assert environment_of(**asked)["NVIDIA_VISIBLE_DEVICES"] == "void"
    sharing = replace(DEFAULTS, nvidia_devices=("nvidia.com/", "volcano.sh/vgpu", "rdma/"))
    assert "NVIDIA_VISIBLE_DEVICES" not in environment_of(defaults=sharing, **asked)


def test_a_dollar_in_a_value_stays_a_dollar():
    environment = environment_of(cluster={"env": [{"name": "A", "value": "$(HOME) costs $5"}]})
    assert environment["A"] == "$$(HOME) costs $$5"


def test_the_pod_is_restricted_and_knows_no_api_server():
    pod, container = pod_of(), container_of()
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/dev/shm"}


def test_last_words_come_from_the_file_alone_and_stopping_gets_its_time():
    assert container_of()["terminationMessagePath"] == "/dev/termination-log"
    assert container_of()["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert pod_of()["terminationGracePeriodSeconds"] == 120
    assert pod_of(recovery={"gracePeriodSeconds": 600})["terminationGracePeriodSeconds"] == 600


def test_the_command_is_the_image_s():
    assert not {"command", "args"} & set(container_of())


@pytest.mark.parametrize(
    ("cluster", "resources"),
    [
        ({}, {}),
        ({"gpusPerNode": 4}, {"nvidia.com/gpu": "4"}),
        ({"gpusPerNode": 1, "gpuResource": "nvidia.com/mig-3g.40gb"}, {"nvidia.com/mig-3g.40gb": "1"}),
        ({"resources": {"cpu": "2", "memory": "4Gi"}}, {"cpu": "2", "memory": "4Gi"}),
        (
            {"gpusPerNode": 4, "resources": {"extended": {"rdma/hca": 4}}},
            {"nvidia.com/gpu": "4", "rdma/hca": "4"},
        ),
    ],
)
def test_what_is_asked_for_is_also_the_limit(cluster, resources):
    got = container_of(cluster={"numNodes": 2, **cluster})["resources"]
    assert got == ({"requests": resources, "limits": resources} if resources else {})


@pytest.mark.parametrize(
    ("groups", "default", "profile"),
    [
        ({}, "", None),
        ({"artifacts": {"uri": "/models"}}, "minio", None),
        ({"artifacts": {"uri": "s3://m"}}, "", None),
        ({"artifacts": {"uri": "s3://m"}}, "minio", "minio"),
        ({"data": {"remoteUri": "s3://rows"}}, "minio", "minio"),
        ({"data": {"remoteUri": "r", "validation": {"uri": "s3://held-out"}}}, "minio", "minio"),
        ({"artifacts": {"uri": "s3://m", "storage": "own"}}, "minio", "own"),
        ({"data": {"remoteUri": "s3://rows", "storage": "own"}}, "", "own"),
    ],
)
def test_a_storage_profile_reaches_the_pod_by_reference(groups, default, profile):
    plan = make_plan(job(**groups), owner_uid=UID, attempt=0, defaults=Defaults(image="i", storage=default))
    (container,) = runtime.gang(plan)["spec"]["template"]["spec"]["containers"]
    name = {"name": f"nexa-storage-{profile}"}
    assert container.get("envFrom") == ([{"configMapRef": name}, {"secretRef": name}] if profile else None)


def test_the_typed_subset_of_the_pod_is_carried_over():
    cluster = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "volumes": [
            {"name": "rows", "mountPath": "/rows", "claim": "rows"},
            {"name": "conf", "mountPath": "/conf", "configMap": "conf", "readOnly": False},
        ],
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
    }
    template = made(cluster=cluster, schedule={"priority": "high", "activeDeadlineSeconds": 60})["spec"]["template"]
    pod = template["spec"]
    assert pod["nodeSelector"] == {"disk": "ssd"}
    assert pod["tolerations"][0] == {"key": "gpu", "operator": "Exists"}
    assert pod["priorityClassName"] == "high"
    assert pod["volumes"][2:] == [
        {"name": "rows", "persistentVolumeClaim": {"claimName": "rows", "readOnly": True}},
        {"name": "conf", "configMap": {"name": "conf"}},
    ]
    assert pod["containers"][0]["volumeMounts"][2:] == [
        {"name": "rows", "mountPath": "/rows", "readOnly": True},
        {"name": "conf", "mountPath": "/conf", "readOnly": False},
    ]
    assert template["metadata"]["annotations"] == {"note": "b"}
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["labels"]["train.nexa.dev/attempt"] == "0"


def test_pods_leave_a_node_in_trouble_long_before_the_server_s_five_minutes_unless_told_to_stay():
    def stays(*tolerations: dict[str, Any]) -> dict[str, int]:
        pod = pod_of(cluster={"tolerations": list(tolerations)})
        return {item["key"]: item["tolerationSeconds"] for item in pod["tolerations"] if "tolerationSeconds" in item}

    assert stays() == {"node.kubernetes.io/unreachable": 5, "node.kubernetes.io/not-ready": 30}
    assert stays({"operator": "Exists"}) == stays(), "put up with any taint, which is not: stay on a dead node"
    told = {"key": "node.kubernetes.io/unreachable", "operator": "Exists"}
    assert set(stays(told)) == {"node.kubernetes.io/not-ready"}


def test_a_job_s_own_image_wins():
    assert container_of(image="mine:2")["image"] == "mine:2"


def test_the_longest_names_are_dns_labels():
    longest = job(**FOLDER).model_copy(update={"metadata": Metadata(name="n" * 45, namespace="ns")})
    plan = make_plan(longest, owner_uid=UID, attempt=99_999, defaults=DEFAULTS)
    (container,) = runtime.gang(plan)["spec"]["template"]["spec"]["containers"]
    (endpoint,) = [item["value"] for item in container["env"] if item["name"] == "NEXA_RDZV_ENDPOINT"]
    assert max(len(part) for part in endpoint.split(".")[:2]) <= 63
    assert len("n" * 45 + "-a99999-4095") <= 63
