"""Gangs carried by others' controllers, and by Kueue's leave: all of them the real ones. The kubelet is played by hand.

On a control plane of its own, where CRDs and webhooks of others stay.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given

from nexa_operator.kinds import WORKLOADS
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import RUNTIMES
from nexa_operator.spec import parse
from nexa_train.config.protocol import CheckpointRef, Termination
from tests.cluster import host
from tests.cluster.api import Api, Refused
from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import ControlPlane, start_control_plane
from tests.cluster.controllers import start_jobset, start_kueue, start_training_operator
from tests.cluster.process import Process
from tests.cluster.run import wait_until
from tests.integration.any_spec import Spec, settings_of, specs
from tests.integration.audit import Log, granted
from tests.integration.harness import (
    NAMED,
    OPERATOR_USER,
    QUEUE,
    Namespace,
    Operator,
    create_job,
    new_namespace,
    open_queue,
    prepare_operator,
)
from tests.integration.likeness import difference

pytestmark = pytest.mark.integration

CHECKPOINT = CheckpointRef(step=10, uri="s3://models/checkpoints/r/step-00000010", digest="d" * 64)
DONE = Termination(run_id="r", exit_code=0, cause="Succeeded", step=10, total_steps=10, checkpoint=CHECKPOINT)
IMAGE = "trainer:test"
SUSPEND = '--patch={"spec":{"schedule":{"suspend":true}}}'
RESUME = '--patch={"spec":{"schedule":{"suspend":false}}}'


class Team(Namespace):
    """A namespace whose jobs run on one runtime."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        super().__init__(cluster, namespace)
        self.runtime = "job"

    def begin(self, name: str, **more: Any) -> None:
        schedule = {"runtime": self.runtime, **more.pop("schedule", {})}
        self.submit(name, schedule=schedule, **more)

    def gang(self, name: str) -> dict[str, Any] | None:
        kind = RUNTIMES[self.runtime].KIND
        return self.get(f"{kind.plural}.{kind.group}/{name}")

    def decided(self, api: Api, name: str, spec: Spec) -> dict[str, Any]:
        """The job of that spec once it has a gang; empty if it shall never have one."""

        def is_decided() -> bool:
            return self.gang(f"{name}-a0") is not None or self.status(name).get("phase") == "Failed"

        if not create_job(api, self.namespace, name, spec):
            return {}
        self.wait(is_decided, f"{name} has a gang or failed", name)
        return self.job(name) if self.gang(f"{name}-a0") else {}

    def ranks(self, name: str, *, attempt: int = 0) -> list[dict[str, Any]]:
        """Pods of an attempt that nobody has asked to go, in the order of their indices."""
        labels = f"train.nexa.dev/job-name={name},train.nexa.dev/attempt={attempt}"
        found = json.loads(self.kubectl("get", "pods", f"--selector={labels}", "--output=json"))["items"]
        there = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        return sorted(there, key=lambda pod: int(RUNTIMES[self.runtime].index(pod)))

    def wait_ranks(self, name: str, count: int = 2, *, attempt: int = 0) -> list[dict[str, Any]]:
        def all_there() -> list[dict[str, Any]] | None:
            return pods if len(pods := self.ranks(name, attempt=attempt)) == count else None

        return self.wait(all_there, f"{count} pods of attempt {attempt} of {name}", name)

    def play(self, pods: list[dict[str, Any]], phase: str, **more: Any) -> None:
        for pod in pods:
            self.play_kubelet(pod, phase, container=RUNTIMES[self.runtime].CONTAINER, **more)

    def run(self, name: str, *, attempt: int = 0, nodes: int = 2) -> list[dict[str, Any]]:
        pods = self.wait_ranks(name, nodes, attempt=attempt)
        self.play(pods, "Running")
        self.wait_true(name, "Running")
        return pods


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    host.require_control_plane()
    started = start_control_plane(audit=True)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def operator(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("operator")
    running = Operator(prepare_operator(plane, folder), folder / "log.jsonl")
    yield running
    running.kill()


@pytest.fixture(scope="module")
def jobset(plane: ControlPlane) -> Process:
    return start_jobset(plane)


@pytest.fixture(scope="module")
def pytorchjob(plane: ControlPlane) -> Process:
    return start_training_operator(plane)


@pytest.fixture(scope="module")
def kueue(plane: ControlPlane, jobset: Process, pytorchjob: Process) -> Process:
    return start_kueue(plane)


@pytest.fixture
def team(plane: ControlPlane, operator: Operator) -> Iterator[Team]:
    with new_namespace(plane) as there:
        yield Team(there.cluster, there.namespace)


@pytest.fixture(params=RUNTIMES)
def anywhere(request: pytest.FixtureRequest, team: Team) -> Team:
    """The same on every runtime."""
    if request.param != "job":
        request.getfixturevalue(request.param)
    team.runtime = request.param
    return team


# First: nothing else may have brought JobSet's CRD yet.
def test_a_runtime_that_the_cluster_does_not_serve_is_said_and_begun_once_it_does(team, operator, request):
    team.runtime = "jobset"
    team.begin("early")
    waiting = team.wait_true("early", "Queued")
    assert waiting["reason"] == "RuntimeUnavailable"
    assert "does not serve jobsets.jobset.x-k8s.io: install JobSet" in waiting["message"]
    assert team.condition("early", "Failed")["status"] == "False"
    assert operator.process.poll() is None
    request.getfixturevalue("jobset")
    team.wait_ranks("early")
    assert team.status("early")["attempt"] == 0


def test_a_gang_is_made_runs_and_succeeds_with_the_same_status_everywhere(anywhere):
    anywhere.begin("whole")
    pods = anywhere.wait_ranks("whole")
    assert [RUNTIMES[anywhere.runtime].index(pod) for pod in pods] == ["0", "1"]
    (reference,) = anywhere.gang("whole-a0")["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["controller"]) == ("NexaTrainingJob", True)
    anywhere.play(pods[:1], "Running")
    anywhere.wait(lambda: "1 of 2 pods run" in anywhere.condition("whole", "Queued")["message"], "one runs", "whole")
    anywhere.play(pods[1:], "Running")
    assert anywhere.wait_true("whole", "Running")["message"] == "2 of 2 pods of attempt 0"
    anywhere.play(pods, "Succeeded", words=DONE)
    anywhere.wait_true("whole", "Succeeded")
    status = anywhere.status("whole")
    assert (status["phase"], status["progress"], status["checkpoint"]["step"]) == ("Succeeded", "10/10", 10)
    assert (status["attempt"], status["restarts"]) == (0, 0)


def test_every_pod_passes_the_restricted_standard_and_knows_its_place(anywhere):
    anywhere.cluster.kubectl(
        "label", f"namespace/{anywhere.namespace}", "pod-security.kubernetes.io/enforce=restricted"
    )
    anywhere.begin("strict")
    for pod in anywhere.wait_ranks("strict"):
        (container,) = pod["spec"]["containers"]
        assert "initContainers" not in pod["spec"]
        names = [item["name"] for item in container["env"]]
        assert "JOB_COMPLETION_INDEX" in names
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(names)
    if anywhere.runtime == "pytorchjob":
        assert anywhere.wait(lambda: anywhere.get("service/strict-a0-worker-0"), "the first pod's Service")
    else:
        assert pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"], "by which its pods meet in the bucket"
        assert not anywhere.list("services"), "nobody makes one where none is needed"


def test_pods_that_may_share_no_bucket_have_names(anywhere):
    anywhere.begin("named", **NAMED)
    pods = anywhere.wait_ranks("named")
    if anywhere.runtime != "pytorchjob":
        (service,) = anywhere.list("services")
        assert {pod["spec"]["subdomain"] for pod in pods} == {service["metadata"]["name"]} == {"named-ranks"}


def test_hints_to_schedulers_reach_every_pod(anywhere):
    """By annotations Kueue and others learn of topology; by labels the coscheduling plugin learns of a gang."""
    topology = {
        "kueue.x-k8s.io/podset-required-topology": "cloud.example/rack",
        "kueue.x-k8s.io/podset-preferred-topology": "cloud.example/block",
        "scheduling.k8s.io/group-name": "hinted",
    }
    gang = {"scheduling.x-k8s.io/pod-group": "hinted", "pod-group.scheduling.sigs.k8s.io": "hinted"}
    anywhere.begin("hinted", cluster={"annotations": topology, "labels": gang})
    pods = anywhere.wait_ranks("hinted")
    for where in (template_of(anywhere, "hinted-a0"), *pods):
        assert topology.items() <= where["metadata"]["annotations"].items()
        assert gang.items() <= where["metadata"]["labels"].items()
        assert where["metadata"]["labels"]["train.nexa.dev/job-name"] == "hinted"


def template_of(team: Team, gang: str) -> dict[str, Any]:
    """Of the pods, in the object that carries them."""
    spec = team.gang(gang)["spec"]
    match team.runtime:
        case "jobset":
            (replicated,) = spec["replicatedJobs"]
            return replicated["template"]["spec"]["template"]
        case "pytorchjob":
            return spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return spec["template"]


def test_a_lost_rank_ends_the_attempt_and_the_next_one_follows(anywhere):
    anywhere.begin("lost")
    pods = anywhere.run("lost")
    words = Termination(run_id="r", exit_code=1, cause="DamagedError", message="torn file")
    anywhere.play(pods[1:], "Failed", words=words)
    anywhere.wait_ranks("lost", attempt=1)
    anywhere.wait(lambda: anywhere.gang("lost-a0") is None, "the first attempt is gone")
    status = anywhere.status("lost")
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (1, 1, 1)
    assert (status["lastFailure"]["cause"], status["lastFailure"]["message"]) == ("DamagedError", "torn file")


def test_a_pod_removed_by_force_ends_the_attempt_even_where_another_takes_its_place(anywhere):
    anywhere.begin("removed", recovery={"maxRestarts": 0})
    first, _ = anywhere.run("removed")
    anywhere.kubectl("delete", f"pod/{first['metadata']['name']}", "--grace-period=0", "--force")
    anywhere.wait_ranks("removed", attempt=1)
    assert anywhere.status("removed")["chargedRestarts"] == 0


def test_a_job_that_failed_for_good_keeps_the_pod_that_says_why_and_no_other(anywhere):
    anywhere.begin("wrong")
    _, second = anywhere.run("wrong")
    anywhere.play([second], "Failed", code=2)
    assert anywhere.wait_true("wrong", "Failed")["reason"] == "ConfigError"
    left = anywhere.wait(lambda: there if len(there := anywhere.ranks("wrong")) == 1 else None, "the survivor ends")
    assert left[0]["metadata"]["name"] == second["metadata"]["name"]


def test_suspending_ends_the_pods_and_resuming_makes_another_attempt_of_another_size(anywhere):
    anywhere.begin("paused")
    anywhere.run("paused")
    anywhere.kubectl("patch", "ntj/paused", "--type=merge", SUSPEND)
    anywhere.wait_true("paused", "Suspended")
    anywhere.wait(lambda: not anywhere.ranks("paused"), "its pods are gone")
    for change in ('--patch={"spec":{"cluster":{"numNodes":4}}}', RESUME):
        anywhere.kubectl("patch", "ntj/paused", "--type=merge", change)
    anywhere.wait_ranks("paused", 4, attempt=1)
    assert anywhere.status("paused")["restarts"] == 0


def test_the_deadline_fails_the_job_and_starts_nothing_again(anywhere):
    anywhere.begin("late", schedule={"activeDeadlineSeconds": 8})
    anywhere.play(anywhere.wait_ranks("late", 2), "Running")
    assert anywhere.wait_true("late", "Failed")["reason"] == "DeadlineExceeded"
    # Whoever's part that is: the Job's controller tries again after some time where it was refused.
    wait_until(lambda: not anywhere.ranks("late"), timeout_seconds=60, what="its pods are gone")
    assert anywhere.gang("late-a1") is None


def asked(cluster: Cluster) -> Log:
    """All that the operator asked of the API server."""
    assert cluster.audit_log is not None
    return Log(cluster.audit_log, 0, OPERATOR_USER)


# --- Kueue ---


@pytest.mark.parametrize("queued", [False, True], ids=["begun at once", "queued"])
def test_of_any_job_lives_what_its_spec_says(anywhere: Team, queued: bool, request: pytest.FixtureRequest) -> None:
    if queued:
        request.getfixturevalue("kueue")
    api, numbers, compared = Api(anywhere.cluster), itertools.count(), Counter[str]()

    @settings_of(max_examples=3)
    @given(spec=specs())
    def holds(spec: Spec) -> None:
        schedule = {"runtime": anywhere.runtime, "suspend": False, **({"queueName": "any"} if queued else {})}
        others = {key: value for key, value in spec.get("schedule", {}).items() if key not in NOT_ANY}
        cluster = {key: value for key, value in spec.get("cluster", {}).items() if key not in NOT_ANY}
        name = f"any-{next(numbers)}"
        body = anywhere.decided(api, name, {**spec, "cluster": cluster, "schedule": {**others, **schedule}})
        assume(body)
        plan = make_plan(parse(body), owner_uid=body["metadata"]["uid"], attempt=0, defaults=Defaults(image=IMAGE))
        for kind, wanted in RUNTIMES[anywhere.runtime].objects(plan):
            live = api.get(kind.path(anywhere.namespace, wanted["metadata"]["name"]))
            assert difference(live, wanted) == "", name
            compared[kind.plural] += 1
        anywhere.kubectl("delete", f"ntj/{name}", "--wait=false")

    holds()
    api.close()
    assert compared[RUNTIMES[anywhere.runtime].KIND.plural] >= 1


NOT_ANY = ("runtime", "suspend", "queueName", "managedBy", "minNodes")
"""Keys that the test says itself, or by which a job has no gang."""


@pytest.fixture
def queue(kueue: Process, anywhere: Team) -> Team:
    """A team whose queue has room for one gang of two pods."""
    open_queue(anywhere.cluster, anywhere.namespace, cpu="2")
    return anywhere


@pytest.fixture(scope="module")
def priorities(plane: ControlPlane) -> None:
    items = [
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value}
        for name, value in (("low", 10), ("high", 1000))
    ]
    plane.kubectl("apply", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def queued(queue: Team, name: str, **schedule: Any) -> None:
    queue.begin(name, schedule={"queueName": QUEUE, **schedule}, cluster={"resources": {"cpu": "1"}})


def finish(queue: Team, name: str, pods: list[dict[str, Any]]) -> None:
    queue.play(pods, "Succeeded", words=DONE)
    queue.wait_true(name, "Succeeded")


def asked_to_change_gangs(queue: Team) -> list[dict[str, Any]]:
    """Writes of the operator to what carries gangs, but their creation."""
    kinds = {RUNTIMES[name].KIND.plural for name in RUNTIMES}
    return [
        record
        for record in asked(queue.cluster).requests()
        if record["verb"] in ("patch", "update")
        and record.get("objectRef", {}).get("namespace") == queue.namespace
        and record["objectRef"]["resource"] in kinds
    ]


def test_gangs_share_a_quota_each_in_its_turn_and_say_what_they_wait_for(queue):
    queued(queue, "first")
    pods = queue.run("first")
    queued(queue, "second")
    said = queue.wait(
        lambda: "insufficient" in (message := queue.condition("second", "Queued").get("message", "")) and message,
        "Kueue's words",
        "second",
    )
    assert "waits for admission by queue team" in said
    assert queue.status("second")["phase"] == "Queued"
    assert queue.ranks("second") == []
    finish(queue, "first", pods)
    finish(queue, "second", queue.run("second"))
    assert queue.status("second")["attempt"] == 0
    assert asked_to_change_gangs(queue) == []


def test_a_preempted_gang_is_charged_nothing_and_goes_on_as_the_same_one(queue, priorities):
    queued(queue, "low", priority="low")
    before = {pod["metadata"]["uid"] for pod in queue.run("low")}
    carrier = queue.gang("low-a0")["metadata"]["uid"]
    queued(queue, "high", priority="high")
    pods = queue.run("high")
    assert queue.wait_true("low", "Queued")["reason"] == "WaitingForAdmission"
    assert queue.condition("low", "Running")["status"] == "False"
    finish(queue, "high", pods)
    after = {pod["metadata"]["uid"] for pod in queue.run("low")}
    assert not before & after
    assert queue.gang("low-a0")["metadata"]["uid"] == carrier
    status = queue.status("low")
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (0, 0, 0)
    finish(queue, "low", queue.ranks("low"))
    assert asked_to_change_gangs(queue) == []


def test_a_gang_that_is_let_go_again_waits_for_its_ranks_that_still_commit(queue, priorities):
    queued(queue, "quick", priority="low")
    queue.bind(queue.wait_ranks("quick"), "far-away")  # with a kubelet that lets them take their time
    before = queue.run("quick")
    queued(queue, "short", priority="high")
    queue.run("short")
    queue.kubectl("delete", "ntj/short")
    let_go = lambda: not RUNTIMES[queue.runtime].state(queue.gang("quick-a0"), [], []).suspended  # noqa: E731
    queue.wait(let_go, "it is let go", "quick")
    # training-operator takes pods that are ending for failed ones: another attempt, which waits for them too.
    attempt = int(queue.runtime == "pytorchjob")
    assert queue.ranks("quick", attempt=attempt) == []
    queue.kubectl("delete", "--force", "--grace-period=0", *(f"pod/{pod['metadata']['name']}" for pod in before))
    queue.run("quick", attempt=attempt)
    status = queue.status("quick")
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (attempt, attempt, 0)


def test_a_rank_lost_in_a_queue_s_gang_is_followed_by_an_attempt_that_is_queued_too(queue):
    queued(queue, "broken")
    queue.play(queue.run("broken")[:1], "Failed", code=1)
    queue.run("broken", attempt=1)
    assert queue.status("broken")["chargedRestarts"] == 1
    assert queue.gang("broken-a1")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def test_a_user_s_suspension_frees_the_quota_and_is_not_undone_by_kueue(queue):
    queued(queue, "mine")
    queue.run("mine")
    queue.kubectl("patch", "ntj/mine", "--type=merge", SUSPEND)
    queue.wait_true("mine", "Suspended")
    queued(queue, "other")
    other = queue.run("other")
    queue.wait(lambda: queue.gang("mine-a0") is None, "the gang is out of the queue")
    assert queue.ranks("mine") == []
    finish(queue, "other", other)
    for change in ('--patch={"spec":{"cluster":{"numNodes":1}}}', RESUME):
        queue.kubectl("patch", "ntj/mine", "--type=merge", change)
    finish(queue, "mine", queue.run("mine", nodes=1))
    assert queue.status("mine")["restarts"] == 0
    assert asked_to_change_gangs(queue) == []


def test_the_rights_over_others_kinds_are_the_ones_that_are_used(queue):
    if queue.runtime == "job":
        pytest.skip("tests/integration/test_rights.py")
    template = {"spec": {"containers": [{"name": "pytorch", "image": "example.invalid/none"}]}}
    job = {"template": {**template, "spec": {**template["spec"], "restartPolicy": "Never"}}}
    another_s: dict[str, dict[str, Any]] = {
        "jobset": {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": "taken-a0"},
            "spec": {"suspend": True, "replicatedJobs": [{"name": "w", "template": {"spec": job}}]},
        },
        "pytorchjob": {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "taken-a0"},
            "spec": {
                "runPolicy": {"suspend": True},
                "pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}},
            },
        },
    }
    queued(queue, "waiting")
    queue.run("waiting")
    queue.begin("whole")
    queue.run("whole")
    queue.kubectl("patch", "ntj/whole", "--type=merge", SUSPEND)
    queue.wait_true("whole", "Suspended")
    queue.kubectl("patch", "ntj/whole", "--type=merge", RESUME)
    queue.play(queue.run("whole", attempt=1)[:1], "Failed", code=1)
    queue.wait_ranks("whole", attempt=2)
    queue.wait(lambda: queue.gang("whole-a1") is None, "the attempt before is gone")
    queue.kubectl("create", "--filename=-", input=json.dumps(another_s[queue.runtime]))
    queue.begin("taken")
    queue.wait(lambda: queue.condition("taken", "Queued").get("reason") == "Refused", "the name is taken", "taken")
    groups = {RUNTIMES[queue.runtime].KIND.group, WORKLOADS.group}
    ours = lambda rights: {right for right in rights if right[0] in groups}  # noqa: E731
    assert ours(asked(queue.cluster).used()) == ours(granted())


def test_a_jobset_s_job_that_somebody_deletes_ends_the_attempt_without_a_charge(team, jobset):
    team.runtime = "jobset"
    team.begin("robbed")
    team.run("robbed")
    team.kubectl("delete", "job/robbed-a0-r-0")
    team.run("robbed", attempt=1)
    status = team.status("robbed")
    assert (status["restarts"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 0, "PodDeleted")


def test_a_jobset_of_which_no_job_can_be_made_says_so_and_goes_on_once_it_can(team, jobset):
    team.runtime = "jobset"
    team.kubectl("create", "quota", "none", "--hard=count/jobs.batch=0")
    team.wait(lambda: (team.get("quota/none") or {}).get("status", {}).get("used"), "the quota counts")
    team.begin("silent")
    why = lambda: team.condition("silent", "Queued")  # noqa: E731
    team.wait(lambda: why().get("reason") == "PodsRefused", "that no Job is made", "silent")
    assert "JobSet's controller has made no Job of silent-a0 and gives no reason" in why()["message"]
    team.kubectl("delete", "quota/none")
    team.wait_ranks("silent")


KUBEFLOW = {
    "TFJob": ("tfReplicaSpecs", "tensorflow"),
    "PyTorchJob": ("pytorchReplicaSpecs", "pytorch"),
    "XGBoostJob": ("xgbReplicaSpecs", "xgboost"),
    "PaddleJob": ("paddleReplicaSpecs", "paddle"),
    "MPIJob": ("mpiReplicaSpecs", "mpi"),
}


@pytest.mark.parametrize("kind", KUBEFLOW)
def test_nobody_has_training_operator_make_pods_that_look_like_a_job_s(team, pytorchjob, kind):
    plural = f"{kind.lower()}s"
    mallory, admin = Api(team.cluster, as_user="mallory"), Api(team.cluster)
    if kind != "PyTorchJob":  # of the others nothing but their group and the shape of their spec is of interest
        said(admin, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", kubeflow_kind(kind))
        team.kubectl("wait", "--for=condition=Established", f"crd/{plural}.kubeflow.org")
    team.kubectl("create", "role", "kubeflow", "--verb=create", f"--resource={plural}.kubeflow.org")
    team.kubectl("create", "rolebinding", "kubeflow", "--role=kubeflow", "--user=mallory")
    key, container = KUBEFLOW[kind]
    path = f"/apis/kubeflow.org/v1/namespaces/{team.namespace}/{plural}?dryRun=All"

    def asked(labels: dict[str, str]) -> str:
        pod = {"containers": [{"name": container, "image": "example.invalid/none"}]}
        roles = {"Worker": {"replicas": 1, "template": {"metadata": {"labels": labels}, "spec": pod}}}
        body = {"apiVersion": "kubeflow.org/v1", "kind": kind, "metadata": {"name": "forged"}, "spec": {key: roles}}
        return said(mallory, path, body)

    wait_until(lambda: not asked({"app": "mine"}), timeout_seconds=20, what=f"{kind}s of one's own are taken")
    assert "made by the Nexa operator alone" in asked({"train.nexa.dev/job-uid": "another's"})
    mallory.close()
    admin.close()


def said(api: Api, path: str, body: dict[str, Any]) -> str:
    try:
        api.create(path, body)
    except Refused as refused:
        return refused.message
    return ""


def kubeflow_kind(kind: str) -> dict[str, Any]:
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.kubeflow.org"},
        "spec": {
            "group": "kubeflow.org",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }


def test_the_operator_asked_for_nothing_that_its_role_does_not_grant_and_nothing_went_wrong_inside(operator):
    assert not [record for record in operator.said if "cannot" in json.dumps(record)]
    assert not [record for record in operator.said if "exception" in record]
