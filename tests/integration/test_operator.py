"""The operator as a process of its own before a real control plane. Only the kubelet is played by hand or by kwok."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from nexa_train.config.protocol import PROGRESS_PORT
from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until
from tests.integration.harness import (
    CHECKPOINT,
    NAMED,
    RELEASE_NAMESPACE,
    Namespace,
    Operator,
    install_chart,
    new_namespace,
    prepare_operator,
    words,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def operator(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("operator")
    kubeconfig = prepare_operator(control_plane, folder)
    running = Operator(kubeconfig, folder / "log.jsonl", NEXA_LEASE_NAMESPACE=RELEASE_NAMESPACE)
    yield running
    running.kill()


@pytest.fixture
def ns(control_plane: Cluster, operator: Operator) -> Iterator[Namespace]:
    with new_namespace(control_plane) as namespace:
        yield namespace


def test_a_job_becomes_an_indexed_job_that_it_owns(ns):
    ns.submit("plain")
    gang = ns.wait(lambda: ns.get("job/plain-a0"), "the gang's Job")
    assert_owned(ns, "plain", gang)
    assert gang["spec"]["completions"] == gang["spec"]["parallelism"] == 2
    assert gang["spec"]["podReplacementPolicy"] == "TerminatingOrFailed"
    assert ns.wait_true("plain", "Queued")["reason"] in ("Creating", "PodsPending")
    for pod in ns.wait_pods("plain-a0", 2):
        (container,) = pod["spec"]["containers"]
        fields = {
            item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"] for item in container["env"] if "valueFrom" in item
        }
        assert fields["NEXA_NODE_ADDRESS"] == "status.podIP"
        label = fields["NEXA_GANG"].removeprefix("metadata.labels['").removesuffix("']")
        assert pod["metadata"]["labels"][label] == gang["metadata"]["uid"], "a name that no other gang ever has"
    assert not ns.list("services")


def test_pods_that_may_share_no_bucket_are_given_names_by_a_service(ns):
    ns.submit("named", **NAMED)
    gang = ns.wait(lambda: ns.get("job/named-a0"), "the gang's Job")
    service = ns.get("service/named-ranks")
    assert_owned(ns, "named", gang, service)
    assert service["spec"]["clusterIP"] == "None"
    for pod in ns.wait_pods("named-a0", 2):
        assert pod["spec"]["subdomain"] == "named-ranks"
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def assert_owned(ns: Namespace, name: str, *children: Any) -> None:
    owner = ns.job(name)["metadata"]["uid"]
    for child in children:
        (reference,) = child["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"]) == (owner, True)


def test_the_object_carries_no_finalizer_and_no_annotation_of_the_operator(ns):
    ns.submit("clean")
    ns.wait_true("clean", "Queued")
    metadata = ns.job("clean")["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata


def test_pods_pass_the_restricted_pod_security_standard(ns):
    ns.cluster.kubectl("label", f"namespace/{ns.namespace}", "pod-security.kubernetes.io/enforce=restricted")
    ns.submit("restricted")
    ns.wait_pods("restricted-a0", 2)


def test_the_run_id_is_the_one_that_the_same_file_has_on_a_laptop(ns):
    from nexa_train.config import Job

    ns.submit("identity")
    run_id = ns.wait(lambda: ns.status("identity").get("runId"), "a run id")
    spec = {"data": {"remoteUri": "stdlib:docstrings"}, "training": {"max_steps": 10, "global_batch_size": 8}}
    metadata = {"name": "identity", "namespace": ns.namespace}
    assert run_id == Job.model_validate({"metadata": metadata, "spec": spec}).run_id


def test_what_a_policy_denies_is_tried_again_until_it_is_allowed(ns):
    freeze = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "freeze"},
        "spec": {
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                ]
            },
            "validations": [{"expression": "false", "message": "not this week"}],
        },
    }
    here = {"matchLabels": {"kubernetes.io/metadata.name": ns.namespace}}
    binding = {
        **freeze,
        "kind": "ValidatingAdmissionPolicyBinding",
        "spec": {
            "policyName": "freeze",
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": here},
        },
    }
    try:
        both = {"apiVersion": "v1", "kind": "List", "items": [freeze, binding]}
        ns.kubectl("create", "--filename=-", input=json.dumps(both))
        probe = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe"}, "spec": {"template": POD}}
        create = ["--namespace", ns.namespace, "create", "--dry-run=server", "--filename=-"]
        ns.wait(
            lambda: "not this week" in ns.cluster.kubectl(*create, input=json.dumps(probe), check=False).stderr,
            "the policy denies Jobs",
        )
        ns.submit("frozen")
        ns.wait(lambda: ns.condition("frozen", "Queued").get("reason") == "Refused", "it is refused", "frozen")
        assert "not this week" in ns.condition("frozen", "Queued")["message"]
    finally:
        for kind in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
            ns.cluster.kubectl("delete", f"{kind}/freeze", "--ignore-not-found")
    ns.wait(lambda: ns.get("job/frozen-a0"), "the gang is made once it is allowed", "frozen")


POD = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "trainer:test"}]}}


def test_running_is_said_once_all_pods_run_and_not_before(ns):
    ns.submit("running")
    first, second = ns.wait_pods("running-a0", 2)
    ns.play_kubelet(first, "Running")
    time.sleep(1)
    assert ns.condition("running", "Running")["status"] == "False"
    ns.play_kubelet(second, "Running")
    assert ns.wait_true("running", "Running")["message"] == "2 of 2 pods of attempt 0"


def test_a_job_of_one_second_reports_its_checkpoint_step_and_loss_from_last_words(ns):
    ns.submit("quick")
    said = words(step=10, total_steps=10, loss=1.2345678, checkpoint=CHECKPOINT)
    for pod in ns.wait_pods("quick-a0", 2):
        ns.play_kubelet(pod, "Succeeded", words=said)
    ns.wait_true("quick", "Succeeded")
    status = ns.status("quick")
    assert (status["phase"], status["progress"], status["loss"]) == ("Succeeded", "10/10", 1.23457)
    assert status["checkpoint"] == {
        "step": 10, "uri": CHECKPOINT.uri, "digest": CHECKPOINT.digest, "weightsDigest": CHECKPOINT.weights_digest,
    }  # fmt: skip
    assert ns.condition("quick", "CheckpointReady")["status"] == "True"
    reasons = {event["reason"] for event in ns.list("events") if event["involvedObject"]["kind"] == "NexaTrainingJob"}
    assert {"Created", "CheckpointCommitted", "Succeeded"} <= reasons
    ns.kubectl("patch", "ntj/quick", "--type=merge", '--patch={"spec":{"schedule":{"suspend":true}}}')
    ns.wait(lambda: ns.status("quick")["observedGeneration"] == 2, "the generation is seen, and nothing more", "quick")
    assert ns.condition("quick", "Succeeded")["status"] == "True"


def test_printed_columns_say_what_a_person_wants_to_know(ns):
    ns.submit("printed")
    for pod in ns.wait_pods("printed-a0", 2):
        ns.play_kubelet(pod, "Succeeded", words=words(step=10, total_steps=10, loss=1.5))
    ns.wait_true("printed", "Succeeded")
    header, line = ns.kubectl("get", "ntj").splitlines()
    assert header.split() == ["NAME", "PHASE", "NODES", "PROGRESS", "LOSS", "ETA", "RESTARTS", "AGE"]
    assert line.split()[:5] == ["printed", "Succeeded", "2", "10/10", "1.5"]


POD_ADDRESS = "127.83.71.2"
"""A loopback address of its own, so that port 8080 there is free."""


@pytest.fixture
def pod_zero() -> Iterator[dict[str, Any]]:
    """What pod 0 answers to GET /progress; change it at will."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer((POD_ADDRESS, PROGRESS_PORT), Handler)
    except OSError as exc:
        pytest.skip(f"cannot listen on {POD_ADDRESS}:{PROGRESS_PORT}: {exc}")
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield answer
    server.shutdown()
    server.server_close()


def test_progress_is_pulled_from_pod_zero_and_silence_restarts_nothing(ns, pod_zero):
    ns.submit("pulled", nodes=1)
    (pod,) = ns.wait_pods("pulled-a0", 1)
    run_id = ns.wait(lambda: ns.status("pulled").get("runId"), "a run id")
    reached = CHECKPOINT.model_copy(update={"step": 4}).model_dump()
    pod_zero |= {"run_id": run_id, "step": 5, "total_steps": 10, "loss": 2.5, "eta_seconds": 75, "checkpoint": reached}
    ns.play_kubelet(pod, "Running", podIP=POD_ADDRESS, podIPs=[{"ip": POD_ADDRESS}])
    ns.wait(lambda: ns.status("pulled").get("progress") == "5/10", "progress", "pulled")
    status = ns.status("pulled")
    assert (status["loss"], status["eta"], status["checkpoint"]["step"]) == (2.5, "1m15s", 4)
    pod_zero["run_id"] = "somebody else's pod with the same address"
    ns.wait_true("pulled", "ProgressUnknown")
    status = ns.status("pulled")
    assert (status["phase"], status["attempt"], status["progress"]) == ("Running", 0, "5/10")


def test_a_lost_rank_ends_the_attempt_and_the_next_one_follows(ns):
    ns.submit("lost")
    first, second = ns.wait_pods("lost-a0", 2)
    ns.play_kubelet(first, "Running")
    ns.play_kubelet(second, "Failed", words=words(exit_code=1, cause="DamagedError", message="torn file"))
    ns.wait(lambda: ns.get("job/lost-a1"), "the second attempt", "lost")
    ns.wait(lambda: ns.get("job/lost-a0") is None, "the first attempt is gone")
    status = ns.status("lost")
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (1, 1, 1)
    assert status["lastFailure"]["cause"] == "DamagedError"
    assert status["lastFailure"]["message"] == "torn file"
    environment = ns.get("job/lost-a1")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "NEXA_ATTEMPT", "value": "1"} in environment


def test_a_disruption_is_not_charged(ns):
    ns.submit("evicted", nodes=1, recovery={"maxRestarts": 0})
    (pod,) = ns.wait_pods("evicted-a0", 1)
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    ns.play_kubelet(pod, "Failed", code=137, conditions=[condition])
    ns.wait(lambda: ns.get("job/evicted-a1"), "the second attempt", "evicted")
    assert ns.status("evicted")["chargedRestarts"] == 0


def test_a_pod_that_is_deleted_by_hand_ends_the_attempt_without_a_charge(ns):
    ns.submit("removed", nodes=2, recovery={"maxRestarts": 0})
    first, _ = ns.wait_pods("removed-a0", 2)
    ns.kubectl("delete", f"pod/{first['metadata']['name']}", "--grace-period=0", "--force")
    ns.wait(lambda: ns.get("job/removed-a1"), "the second attempt", "removed")
    assert ns.status("removed")["chargedRestarts"] == 0


def test_a_success_of_pods_that_the_controller_adopted_is_not_believed(ns):
    ns.submit("usurped", nodes=2)
    pods = ns.wait_pods("usurped-a0", 2)
    ns.bind(pods, "dead")
    for index in ("0", "1"):
        name, annotations = f"forged-{index}", {"batch.kubernetes.io/job-completion-index": index}
        container = {"name": "trainer", "image": "example.invalid/none"}
        forged = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"restartPolicy": "Never", "containers": [container]},
        }
        ns.kubectl("create", "--filename=-", input=json.dumps(forged))
        ns.play_kubelet(ns.get(f"pod/{name}"), "Succeeded")
    uid = ns.get("job/usurped-a0")["metadata"]["uid"]
    ns.kubectl("label", "pods", "forged-0", "forged-1", f"batch.kubernetes.io/controller-uid={uid}")
    ns.wait_pods("usurped-a1", 2)
    status = ns.status("usurped")
    assert (status["attempt"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 0, "PodDeleted")


def test_a_pod_that_hangs_on_a_dead_node_does_not_hold_up_the_next_attempt(ns):
    ns.submit("hung", nodes=2)
    pods = ns.wait_pods("hung-a0", 2)
    ns.bind(pods, "dead")
    first = pods[0]["metadata"]["name"]
    ns.kubectl("delete", f"pod/{first}", "--wait=false")
    ns.wait_pods("hung-a1", 2)
    hanging = ns.get(f"pod/{first}")
    assert hanging is not None
    assert "deletionTimestamp" in hanging["metadata"]
    assert ns.status("hung")["chargedRestarts"] == 0


def test_a_wrong_config_in_the_rank_is_never_tried_again(ns):
    ns.submit("wrong", nodes=1)
    (pod,) = ns.wait_pods("wrong-a0", 1)
    ns.play_kubelet(pod, "Failed", code=2)
    assert ns.wait_true("wrong", "Failed")["reason"] == "ConfigError"
    assert ns.condition("wrong", "Stalled")["status"] == "True"
    time.sleep(1)
    assert ns.get("job/wrong-a1") is None


def test_the_budget_runs_out_and_the_job_fails_for_good(ns):
    ns.submit("spent", nodes=1, recovery={"maxRestarts": 1})
    for attempt in (0, 1):
        (pod,) = ns.wait_pods(f"spent-a{attempt}", 1)
        ns.play_kubelet(pod, "Failed", code=1)
    assert ns.wait_true("spent", "Failed")["reason"] == "RestartsExhausted"


def test_a_new_checkpoint_refills_the_budget(ns):
    ns.submit("refilled", nodes=1, recovery={"maxRestarts": 1})
    for attempt, step in ((0, 5), (1, 8)):
        (pod,) = ns.wait_pods(f"refilled-a{attempt}", 1)
        reached = CHECKPOINT.model_copy(update={"step": step})
        ns.play_kubelet(pod, "Failed", words=words(exit_code=1, cause="Oops", checkpoint=reached))
    ns.wait_pods("refilled-a2", 1)
    assert ns.status("refilled")["checkpoint"]["step"] == 8


def test_a_job_suspended_from_the_start_makes_no_pods_until_it_is_resumed(ns):
    ns.submit("held", schedule={"suspend": True})
    ns.wait_true("held", "Suspended")
    assert ns.list("jobs") == []
    ns.kubectl("patch", "ntj/held", "--type=merge", '--patch={"spec":{"schedule":{"suspend":false}}}')
    ns.wait_pods("held-a0", 2)


def test_suspending_stops_the_gang_and_resuming_makes_another_even_of_another_size(ns):
    ns.submit("paused")
    for pod in ns.wait_pods("paused-a0", 2):
        ns.play_kubelet(pod, "Running")
    ns.wait_true("paused", "Running")
    ns.kubectl("patch", "ntj/paused", "--type=merge", '--patch={"spec":{"schedule":{"suspend":true}}}')
    ns.wait_true("paused", "Suspended")
    assert ns.get("job/paused-a0")["spec"]["suspend"] is True
    for change in ('{"spec":{"cluster":{"numNodes":4}}}', '{"spec":{"schedule":{"suspend":false}}}'):
        ns.kubectl("patch", "ntj/paused", "--type=merge", f"--patch={change}")
    ns.wait_pods("paused-a1", 4)
    assert ns.status("paused")["restarts"] == 0


def test_a_gang_that_somebody_else_suspends_goes_on_when_he_lets_it(ns):
    ns.submit("held", nodes=1)
    (pod,) = ns.wait_pods("held-a0", 1)
    ns.play_kubelet(pod, "Running")
    ns.wait_true("held", "Running")
    ns.kubectl("patch", "job/held-a0", '--patch={"spec":{"suspend":true}}')
    ns.wait(lambda: ns.condition("held", "Queued").get("reason") == "SuspendedByAnother", "it waits", "held")
    ns.kubectl("patch", "job/held-a0", '--patch={"spec":{"suspend":false}}')
    (pod,) = ns.wait_pods("held-a0", 1)
    ns.play_kubelet(pod, "Running")
    ns.wait_true("held", "Running")
    assert ns.status("held")["attempt"] == 0


def test_deleting_the_job_collects_its_children(ns):
    ns.submit("gone")
    ns.wait_pods("gone-a0", 2)
    ns.kubectl("delete", "ntj/gone")
    ns.wait(lambda: not ns.list("jobs") and not ns.list("services"), "children are gone")


def test_what_passes_the_crd_and_not_the_models_becomes_a_condition_and_no_crash(ns, operator):
    ns.submit("refused", data={"remoteUri": "s3://rows", "columns": {"promt": "question"}})
    failed = ns.wait_true("refused", "Failed")
    assert failed["reason"] == "ConfigRejected"
    assert "data.columns: format messages has no promt" in failed["message"]
    ns.submit("no-image", backend="axolotl")
    waits = ns.wait_true("no-image", "Queued")
    assert waits["reason"] == "RuntimeUnavailable"
    assert "trainerHeavyImage" in waits["message"]
    assert operator.process.poll() is None


def test_a_job_of_another_controller_is_left_alone(ns):
    ns.submit("theirs", schedule={"managedBy": "example.com/other"})
    ns.submit("ours")
    ns.wait_pods("ours-a0", 2)
    assert ns.status("theirs") == {}
    assert ns.get("job/theirs-a0") is None


def test_a_name_that_is_taken_is_said_and_waited_for(ns):
    ns.kubectl("create", "job", "taken-a0", "--image=i")
    ns.submit("taken")
    message = ns.wait(
        lambda: (c := ns.condition("taken", "Queued")).get("reason") == "Refused" and c["message"],
        "refusal",
        "taken",
    )
    assert "another owner" in message
    ns.kubectl("delete", "job/taken-a0")
    ns.wait(lambda: (ns.get("job/taken-a0") or {}).get("spec", {}).get("completions") == 2, "our Job", "taken")


def test_pods_that_nobody_may_make_are_explained_and_begun_once_they_may_be(ns):
    ns.kubectl("create", "quota", "crowded", "--hard=pods=1", "--scopes=BestEffort")
    ns.submit("crowded")
    why = lambda: ns.condition("crowded", "Queued")  # noqa: E731
    ns.wait(lambda: why().get("reason") == "PodsRefused", "what is said of the quota", "crowded")
    assert "of 2 pods run: Error creating: pods is forbidden" in why()["message"]
    assert "quota" in why()["message"]
    ns.kubectl("delete", "quota/crowded")
    for pod in ns.wait_pods("crowded-a0", 2):
        ns.play_kubelet(pod, "Running")
    ns.wait_true("crowded", "Running")
    ns.kubectl("delete", "ntj/crowded")


def test_a_scheduler_that_is_not_there_is_named(ns):
    ns.submit("ignored", schedule={"schedulerName": "absent"})
    said = lambda: ns.condition("ignored", "Queued").get("message", "")  # noqa: E731
    ns.wait(lambda: "no scheduler absent has tried" in said(), "what its pods wait for", "ignored")
    ns.kubectl("delete", "ntj/ignored")


def test_the_time_to_live_ends_a_finished_job(ns):
    ns.submit("brief", nodes=1, schedule={"ttlSecondsAfterFinished": 1})
    (pod,) = ns.wait_pods("brief-a0", 1)
    ns.play_kubelet(pod, "Succeeded")
    ns.wait(lambda: ns.get("ntj/brief") is None, "the job is deleted")


def test_a_killed_operator_goes_on_where_it_was_and_creates_nothing_twice(ns, operator):
    ns.submit("before")
    first, second = ns.wait_pods("before-a0", 2)
    uid = ns.get("job/before-a0")["metadata"]["uid"]
    operator.kill()
    ns.submit("during")
    ns.play_kubelet(first, "Running")
    ns.play_kubelet(second, "Running")
    operator.start()
    ns.wait_pods("during-a0", 2)
    ns.wait_true("before", "Running")
    assert ns.get("job/before-a0")["metadata"]["uid"] == uid
    assert {job["metadata"]["name"] for job in ns.list("jobs")} == {"before-a0", "during-a0"}
    assert ns.status("before")["restarts"] == 0


def test_a_rank_lost_while_the_operator_was_down_is_answered_when_it_is_back(ns, operator):
    ns.submit("unseen", nodes=1)
    (pod,) = ns.wait_pods("unseen-a0", 1)
    operator.kill()
    ns.play_kubelet(pod, "Failed", code=1)
    operator.start()
    ns.wait(lambda: ns.get("job/unseen-a1"), "the second attempt", "unseen")
    assert ns.status("unseen")["restarts"] == 1


def test_jobs_end_by_themselves_on_fake_nodes(ns, control_plane):
    control_plane.fake_nodes(2)
    toleration = {"key": "kwok.x-k8s.io/node", "operator": "Equal", "value": "fake"}
    devices = {"resources": {"extended": {"example.com/hca": 2}}}
    ns.submit("fake", cluster={"tolerations": [toleration], **devices})
    ns.wait_true("fake", "Succeeded")


def test_a_device_of_which_no_node_has_enough_is_named(ns, control_plane):
    control_plane.fake_nodes(1)
    toleration = {"key": "kwok.x-k8s.io/node", "operator": "Equal", "value": "fake"}
    ns.submit("greedy", cluster={"tolerations": [toleration], "resources": {"extended": {"example.com/hca": 3}}})
    ns.wait(
        lambda: "Insufficient example.com/hca" in ns.condition("greedy", "Queued").get("message", ""),
        "it says why",
        "greedy",
    )


def test_sigterm_ends_the_operator_cleanly_within_seconds_and_lets_the_next_one_act_at_once(ns, operator):
    assert operator.stop() == 0
    (lease,) = [each for each in _leases(ns) if each["metadata"]["name"] == "nexa"]
    assert not lease["spec"].get("holderIdentity")
    operator.start()


def _leases(ns):
    return json.loads(ns.cluster.kubectl("get", "leases", f"-n={RELEASE_NAMESPACE}", "-o=json").stdout)["items"]


WATCHES = "nexa_watch_age_seconds{kind="


def _events(operator):
    return {record["event"] for record in operator.said}


def test_a_second_operator_waits_for_the_lease_and_takes_over(ns, operator, tmp_path):
    ns.submit("first-acts")
    ns.wait_pods("first-acts-a0", 2)  # it holds the Lease, however lately it was started
    second = Operator(
        operator.kubeconfig, tmp_path / "log.jsonl", NEXA_LEASE_NAMESPACE=RELEASE_NAMESPACE, NEXA_IDENTITY="second"
    )
    try:
        wait_until(lambda: _events(second) & {"started"}, timeout_seconds=40, what="the second operator has started")
        ns.submit("first-acts-again")
        ns.wait_pods("first-acts-again-a0", 2)
        assert "lease" not in _events(second), "it would say that it holds it"
        assert WATCHES not in second.metrics(), "it would gather what comes by"
        operator.kill()
        ns.submit("second-acts")
        wait_until(lambda: ns.get("job/second-acts-a0"), timeout_seconds=40, what="the second operator acts")
        assert WATCHES in second.metrics()
    finally:
        second.kill()
        operator.start()


def test_one_that_waits_for_the_lease_ends_when_it_is_told_to(ns, operator, tmp_path):
    ns.submit("somebody-acts")
    ns.wait_pods("somebody-acts-a0", 2)
    waiting = Operator(
        operator.kubeconfig, tmp_path / "log.jsonl", NEXA_LEASE_NAMESPACE=RELEASE_NAMESPACE, NEXA_IDENTITY="waiting"
    )
    try:
        wait_until(lambda: _events(waiting) & {"started"}, timeout_seconds=40, what="it has started")
        assert waiting.stop() == 0
    finally:
        waiting.kill()


def test_in_one_namespace_the_operator_needs_only_a_role_there_and_touches_nothing_else(ns, operator, tmp_path):
    operator.kill()
    ns.cluster.kubectl("delete", "clusterrolebinding/nexa")
    try:
        install_chart(ns.cluster, f"watchNamespace={ns.namespace}")
        alone = Operator(operator.kubeconfig, tmp_path / "log.jsonl", NEXA_WATCH_NAMESPACE=ns.namespace)
        ns.submit("inside")
        ns.wait_pods("inside-a0", 2)
        alone.kill()
        assert not [record for record in alone.said if "cannot" in json.dumps(record)]
    finally:
        install_chart(ns.cluster)
        operator.start()


def test_the_operator_asked_for_nothing_that_its_role_does_not_grant(operator):
    # A namespace that is being deleted forbids too, in other words.
    assert not [record for record in operator.said if "cannot" in json.dumps(record)]


def test_nothing_went_wrong_inside(operator):
    assert not [record for record in operator.said if "exception" in record]


def test_every_record_is_json_and_carries_no_token(operator):
    token = json.loads(operator.kubeconfig.read_text())["users"][0]["user"]["token"]
    assert operator.said
    assert token not in json.dumps(operator.said)
