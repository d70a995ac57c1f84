"""What every runtime makes of a plan, and that `observe` reads all of them alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nexa_operator.decide import Create, Fail, Hold, Restart, Suspend, Wait, Watch, decide
from nexa_operator.kinds import JOBSETS, PYTORCHJOBS, WORKLOADS
from nexa_operator.observe import Gang, Observed, observe, observe_unavailable
from nexa_operator.plan import Defaults, RunPlan, make_plan
from nexa_operator.queueing import LABEL_PRIORITY, LABEL_QUEUE, waits_for
from nexa_operator.reading import as_time
from nexa_operator.runtimes import RUNTIMES, beside, runtime_of
from nexa_train.config.spec import ScheduleSpec
from tests.unit.operator.builders import GANG_UID, NOW, UID, body, condition, ended, failed, gang, job, owned_by, seen

every_runtime = pytest.mark.parametrize("name", RUNTIMES)
PART_UID = "77777777-2222-3333-4444-555555555555"
QUEUED = ScheduleSpec(queue_name="team")


def plan(name: str, **groups: Any) -> RunPlan:
    schedule = {"runtime": name, **groups.pop("schedule", {})}
    described = job(schedule=schedule, **groups)
    return make_plan(described, owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1"))


def made(name: str, **groups: Any) -> dict[str, Any]:
    return RUNTIMES[name].objects(plan(name, **groups))[-1][1]


def template_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    if document["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    if document["kind"] == "PyTorchJob":
        spec = spec["pytorchReplicaSpecs"]["Worker"]
    template: dict[str, Any] = spec["template"]
    return template


def environment_of(document: dict[str, Any]) -> dict[str, Any]:
    (container,) = template_of(document)["spec"]["containers"]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


@every_runtime
def test_what_carries_the_gang_is_named_labelled_and_owned_alike(name):
    metadata = made(name)["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("demo-a3", "team")
    assert metadata["labels"] == {
        "train.nexa.dev/job-uid": UID, "train.nexa.dev/job-name": "demo", "train.nexa.dev/attempt": "3",
        "train.nexa.dev/nodes": "2",
    }  # fmt: skip
    (reference,) = metadata["ownerReferences"]
    assert (reference["uid"], reference["controller"]) == (UID, True)
    del metadata["labels"]["train.nexa.dev/nodes"]
    assert metadata["labels"].items() <= template_of(made(name))["metadata"]["labels"].items()


@every_runtime
def test_the_same_pod_runs_everywhere_but_for_what_finds_the_first_one(name):
    ours, indexed = template_of(made(name))["spec"], template_of(made("job"))["spec"]
    for spec in (ours, indexed):
        (container,) = spec["containers"]
        # training-operator accepts one name only.
        container["name"] = "trainer"
        differing = ("NEXA_JOB", "NEXA_RDZV_ENDPOINT", "NEXA_GANG", "NEXA_NODE_ADDRESS", "JOB_COMPLETION_INDEX")
        container["env"] = [item for item in container["env"] if item["name"] not in differing]
        for key in ("subdomain", "restartPolicy"):
            spec.pop(key, None)
    assert ours == indexed


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        ("job", "demo-a3-0.demo-ranks.team:29500"),
        ("jobset", "demo-a3-r-0-0.demo-ranks.team:29500"),
        ("pytorchjob", "demo-a3-worker-0:29500"),
    ],
)
def test_the_first_pod_is_found_where_the_runtime_has_it(name, endpoint):
    assert environment_of(made(name, artifacts={"uri": "/mnt/shared"}))["NEXA_RDZV_ENDPOINT"] == endpoint


def test_a_jobset_makes_no_service_but_ours():
    def network_of(**groups: Any) -> Any:
        return made("jobset", **groups)["spec"]["network"]

    assert network_of() == {"enableDNSHostnames": False}
    named = network_of(artifacts={"uri": "/mnt/shared"})
    assert (named["enableDNSHostnames"], named["subdomain"]) == (True, "demo-ranks")


def test_a_pytorchjob_s_pods_learn_their_index_from_their_label_and_nothing_of_ranks():
    document = made("pytorchjob")
    field = {"fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}}
    assert environment_of(document)["JOB_COMPLETION_INDEX"] == field
    assert set(document["spec"]["pytorchReplicaSpecs"]) == {"Worker"}, "a Master brings RANK and an init container"


def test_no_runtime_restarts_anything():
    jobset, pytorch = made("jobset")["spec"], made("pytorchjob")["spec"]
    assert jobset["failurePolicy"] == {"maxRestarts": 0}
    inner = jobset["replicatedJobs"][0]["template"]["spec"]
    assert (jobset["replicatedJobs"][0]["replicas"], inner["completions"], inner["backoffLimit"]) == (1, 2, 0)
    assert inner["template"]["spec"]["restartPolicy"] == "Never"
    assert pytorch["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "Never"
    assert "backoffLimit" not in pytorch["runPolicy"], "it deletes the failed pod before it is read"
    assert pytorch["runPolicy"]["cleanPodPolicy"] == "Running"


@every_runtime
def test_no_gang_has_a_deadline_of_its_own_which_would_count_while_its_pods_wait_for_room(name):
    without_job = {**made(name, schedule={"activeDeadlineSeconds": 60}), "template": None}
    carriers = [without_job["spec"], without_job["spec"].get("runPolicy", {})]
    assert not [spec for spec in carriers if "activeDeadlineSeconds" in spec]


@every_runtime
def test_a_queue_s_gang_is_born_suspended_with_the_label_and_any_other_is_not(name):
    cluster = {"numNodes": 2, "labels": {LABEL_PRIORITY: "urgent"}}
    queued = made(name, schedule={"queueName": "team", "priority": "high"}, cluster=cluster)
    assert queued["metadata"]["labels"][LABEL_QUEUE] == "team"
    assert queued["metadata"]["labels"][LABEL_PRIORITY] == "urgent"
    assert RUNTIMES[name].state(queued, (), ()).suspended
    assert template_of(queued)["spec"]["priorityClassName"] == "high"
    assert LABEL_QUEUE not in template_of(queued)["metadata"]["labels"], "Kueue would queue each pod too"
    plain = made(name, cluster=cluster)
    assert not RUNTIMES[name].state(plain, (), ()).suspended
    assert not {LABEL_QUEUE, LABEL_PRIORITY} & set(plain["metadata"]["labels"])


@every_runtime
def test_another_scheduler_is_told_how_many_pods_start_together_and_the_cluster_s_own_nothing(name):
    given = made(name, schedule={"schedulerName": "volcano"}, cluster={"numNodes": 4})
    hint = {"scheduling.volcano.sh/group-min-member": "4"}
    jobs = {"job": lambda: given, "jobset": lambda: given["spec"]["replicatedJobs"][0]["template"]}
    assert name not in jobs or jobs[name]()["metadata"]["annotations"] == hint
    assert template_of(given)["spec"]["schedulerName"] == "volcano"
    plain = made(name, cluster={"numNodes": 4})
    assert "schedulerName" not in template_of(plain)["spec"]
    assert "group-min-member" not in json.dumps(plain)


def test_a_gang_that_may_shrink_starts_with_as_many_pods_as_are_enough():
    # Placed as a whole or not at all, it would never show how many find a node.
    described = job(schedule={"schedulerName": "volcano"}, cluster={"numNodes": 4, "minNodes": 2})
    for num_nodes, enough in ((None, "2"), (4, "2"), (2, "2")):
        made = make_plan(described, owner_uid=UID, attempt=1, defaults=Defaults(image="i"), num_nodes=num_nodes)
        document = RUNTIMES["job"].objects(made)[-1][1]
        assert document["metadata"]["annotations"] == {"scheduling.volcano.sh/group-min-member": enough}
        policy = RUNTIMES["pytorchjob"].objects(made)[-1][1]["spec"]["runPolicy"]
        assert policy.get("schedulingPolicy") == (None if num_nodes == 2 else {"minAvailable": 2})


def test_what_runs_beside_a_gang_is_no_gang():
    # One that waited for as many pods as the gang has would wait for ever.
    labels = {"scheduling.x-k8s.io/pod-group": "a-gang", "team": "a"}
    cluster = {"numNodes": 4, "labels": labels, "annotations": {"scheduling.k8s.io/group-name": "a-gang"}}
    given = plan("job", schedule={"schedulerName": "volcano"}, cluster=cluster)
    for document in (beside.room(given, num_pods=2), beside.removal(given)):
        template = document["spec"]["template"]
        assert template["spec"]["schedulerName"] == "volcano"
        assert template["metadata"]["labels"]["team"] == "a"
        assert "group-min-member" not in json.dumps(document)
        assert "a-gang" not in json.dumps(template["metadata"])


@every_runtime
def test_the_suspension_is_what_the_runtime_reads_as_one(name):
    document = made(name)
    for key, value in RUNTIMES[name].suspension().items():
        document["spec"][key] = {**document["spec"].get(key, {}), **value} if isinstance(value, dict) else value
    assert RUNTIMES[name].state(document, (), ()).suspended


def test_the_longest_name_of_a_jobset_s_pods_fits_for_a_thousand_nodes_and_attempts_up_to_ten():
    assert len(f"{'n' * 45}-a9-r-0-999-abcde") <= 63


# --- what observe reads ---


def live(name: str, *, conditions: tuple[dict[str, str], ...] = (), **metadata: Any) -> list[dict[str, Any]]:
    """The gang of attempt 3 as the API server has it, and its parts."""
    document = made(name)
    document["metadata"] |= {"uid": GANG_UID, "creationTimestamp": "2026-11-23T12:00:00Z", **metadata}
    if name != "jobset":
        return [{**document, "status": {"conditions": list(conditions)}}]
    part = {
        "metadata": {"name": "demo-a3-r-0", "uid": PART_UID, "ownerReferences": owned_by(GANG_UID)},
        "spec": {},
        "status": {"conditions": list(conditions)},
    }
    return [document, part]


def pod(name: str, index: int, *, phase: str = "Running", made_at: str = "2026-11-23T12:00:01Z", **more: Any) -> Any:
    label = {"pytorchjob": "training.kubeflow.org/replica-index"}.get(name, "batch.kubernetes.io/job-completion-index")
    metadata = {
        "name": f"pod-{index}",
        "labels": {label: str(index)},
        "creationTimestamp": made_at,
        "ownerReferences": owned_by(PART_UID if name == "jobset" else GANG_UID),
        **more.pop("metadata", {}),
    }
    return {"metadata": metadata, "status": {"phase": phase, **more}}


def observed(name: str, children: list[Any], pods: list[Any], **status: Any) -> Gang:
    found = observe(body(schedule={"runtime": name}, status={"attempt": 3, **status}), children=children, pods=pods)
    assert found.gang is not None
    return found.gang


@every_runtime
def test_pods_are_found_with_their_indices_and_last_words_and_strangers_are_not(name):
    said = ended(5, "", reason="Error")
    said[0]["name"] = RUNTIMES[name].CONTAINER
    strange = pod(name, 0, metadata={"ownerReferences": owned_by("somebody")})
    found = observed(name, live(name), [pod(name, 1, phase="Failed", containerStatuses=said), pod(name, 0), strange])
    assert [(rank.index, rank.phase, rank.exit_code) for rank in found.ranks] == [
        (0, "Running", None),
        (1, "Failed", 5),
    ]


@pytest.mark.parametrize(
    ("name", "kind", "complete", "failure"),
    [
        ("job", "SuccessCriteriaMet", True, ""),
        ("jobset", "SuccessCriteriaMet", True, ""),
        ("pytorchjob", "Succeeded", True, ""),
        ("job", "FailureTarget", False, "Why"),
        ("jobset", "FailureTarget", False, "Why"),
        ("pytorchjob", "Failed", False, "Why"),
    ],
)
def test_the_end_is_read_where_it_is_known_first(name, kind, complete, failure):
    found = observed(name, live(name, conditions=(condition(kind, reason="Why", message="because"),)), [])
    assert (found.complete, found.failure) == (complete, failure)
    assert found.failure_message == ("because" if failure else "")


def test_a_jobset_that_fails_without_its_job_is_failed():
    (child, _) = live("jobset")
    child["status"] = {"conditions": [condition("Failed", reason="FailedJobs", message="cannot make it")]}
    assert observed("jobset", [child], []).failure == "FailedJobs"


def test_a_pytorchjob_is_complete_once_every_worker_is_for_nobody_tells_of_its_condition():
    done = [pod("pytorchjob", index, phase="Succeeded") for index in (0, 1)]
    assert not observed("pytorchjob", live("pytorchjob"), done[:1]).complete
    assert observed("pytorchjob", live("pytorchjob"), done).complete


RAN = [condition("Running", lastTransitionTime="2026-11-23T12:00:30Z")]


@pytest.mark.parametrize(
    "second", [[pod("pytorchjob", 1, phase="Pending")], []], ids=["another is there", "it is not there yet"]
)
def test_a_worker_that_training_operator_replaces_is_lost_once_all_have_run(second):
    pods = [pod("pytorchjob", 0), *second]
    assert observed("pytorchjob", live("pytorchjob"), pods).lost_ranks == ()
    gang = observed("pytorchjob", live("pytorchjob"), pods, conditions=RAN)
    assert len(gang.lost_ranks) == 1
    got = decide(seen(gang), spec=job(recovery={"maxRestarts": 0}).spec, now=NOW)
    assert isinstance(got, Restart)
    assert (got.loss.cause, got.charged) == ("PodDeleted", 0)


@pytest.mark.parametrize("name", ["job", "jobset"])
def test_a_pod_that_is_gone_is_for_the_job_s_controller_to_call_a_failure(name):
    assert observed(name, live(name), [pod(name, 0)], conditions=RAN).lost_ranks == ()


@pytest.mark.parametrize("pods", [[], [pod("jobset", 0, phase="Pending")]], ids=["no pods yet", "new pods"])
def test_a_jobset_s_job_that_somebody_deleted_takes_all_ranks_along_once_all_have_run(pods):
    child, part = live("jobset")
    assert observed("jobset", [child, part], pods).lost_ranks == ()
    assert len(observed("jobset", [child, part], pods, conditions=RAN).lost_ranks) == 2
    assert len(observed("jobset", [child], [], conditions=RAN).lost_ranks) == 2, "it is not made anew yet"


@every_runtime
def test_a_gang_stands_until_its_controller_has_let_it_go(name):
    """Kueue takes its suspension back before that, while pods of before still end."""
    for gang_says in (True, False):
        document, *parts = live(name)
        says = document if gang_says or not parts else parts[0]
        says["status"] = {"conditions": [condition("Suspended")]}
        assert observed(name, [document, *parts], []).suspended
        says["status"] = {"conditions": [condition("Suspended") | {"status": "False", "lastTransitionTime": "x"}]}
        assert not observed(name, [document, *parts], []).suspended


@every_runtime
def test_pods_of_before_a_preemption_are_not_the_gang_s_once_it_is_let_go_again(name):
    resumed = {"type": "Suspended", "status": "False", "lastTransitionTime": "2026-11-23T12:05:00Z"}
    children = live(name)
    children[0]["status"] = {"conditions": [resumed]}
    old = pod(name, 0, metadata={"deletionTimestamp": "2026-11-23T12:06:00Z"})
    new = pod(name, 0, phase="Pending", made_at="2026-11-23T12:05:00Z")
    gang = observed(name, children, [old, new], conditions=RAN)
    (rank,) = gang.ranks
    assert (rank.phase, rank.lost) == ("Pending", False)
    (forerunner,) = gang.forerunners
    assert forerunner.gone_by == as_time("2026-11-23T12:06:00Z")


# --- what is decided for all of them ---


def decided(observed: Observed, schedule: ScheduleSpec) -> Any:
    return decide(observed, spec=job().spec.model_copy(update={"schedule": schedule}), now=NOW)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        pytest.param(seen(), Create(attempt=0, num_nodes=2), id="nothing there: made, to be queued"),
        pytest.param(seen(gang(suspended=True)), Watch(), id="suspended: its queue has not let it go"),
        pytest.param(
            seen(gang(failed(exit_code=75), suspended=True)), Watch(), id="preempted: its ranks stop, it goes on later"
        ),
        pytest.param(seen(gang(failed())), "Restart", id="lost while it ran: another attempt, queued anew"),
        pytest.param(
            seen(gang(failed(exit_code=75), suspended=True, failure="BackoffLimitExceeded")),
            "Restart",
            id="preempted, and its controller called that a failure: another attempt",
        ),
    ],
)
def test_a_queued_job_that_should_run(observed, expected):
    got = decided(observed, QUEUED)
    assert (type(got).__name__ if isinstance(expected, str) else got) == expected


@pytest.mark.parametrize("there", [gang(suspended=True), gang()], ids=["waits", "runs"])
def test_a_user_s_suspension_takes_the_gang_out_of_its_queue_and_never_touches_its_suspend(there):
    suspended = QUEUED.model_copy(update={"suspend": True})
    assert decided(seen(there), suspended) == Suspend(gang="demo-a0", withdraw=True)
    assert decided(seen(gang(deleting=True)), suspended) == Hold()
    assert decided(seen(), suspended) == Hold()


def test_a_runtime_that_the_cluster_does_not_serve_is_waited_for_and_named():
    missing = observe_unavailable(body(schedule={"runtime": "jobset"}))
    got = decided(missing, ScheduleSpec(runtime="jobset"))
    assert isinstance(got, Wait)
    assert got.reason == "RuntimeUnavailable"
    assert "jobsets.jobset.x-k8s.io" in got.message
    assert "install JobSet" in got.message
    assert not isinstance(got, Fail)
    assert decided(missing, ScheduleSpec(suspend=True)) == Hold()


def test_what_a_queue_s_gang_waits_for_is_said_in_kueue_s_words():
    pending = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for cpu"}
    workload = {"status": {"conditions": [pending]}}
    assert waits_for("team", [workload]) == "waits for admission by queue team: insufficient unused quota for cpu"
    assert waits_for("team", []) == "waits for admission by queue team"
    assert waits_for("team", None).endswith("does not serve workloads.kueue.x-k8s.io: install Kueue")


def test_kinds_are_where_their_controllers_have_them():
    assert JOBSETS.path("ns", "a") == "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ns/jobsets/a"
    assert (PYTORCHJOBS.group, WORKLOADS.group) == ("kubeflow.org", "kueue.x-k8s.io")


def test_a_job_that_names_no_runtime_or_a_strange_one_is_looked_at_all_the_same():
    for strange in ({}, {"spec": None}, body(schedule=None), body(schedule={"runtime": "slurm"})):
        assert runtime_of(strange) is RUNTIMES["job"]
