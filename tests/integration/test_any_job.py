"""Any valid job, changed in any way: what lives in the cluster is what its spec says; what may not change does not."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from nexa_operator.errors import RuntimeUnavailableError
from nexa_operator.observe import read_record
from nexa_operator.plan import Defaults, RunPlan, image_of, make_plan
from nexa_operator.runtimes import job as runtime
from nexa_operator.spec import is_ours, parse
from nexa_train.config import Job
from nexa_train.errors import ConfigError
from tests.cluster.api import Refused
from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until
from tests.integration.any_spec import Path as Leaf
from tests.integration.any_spec import Spec, changed, is_valid, leaves, settings_of, specs
from tests.integration.harness import create_job, pod_status, prepare_operator
from tests.integration.lane import Lane, conditions, new_lane
from tests.integration.likeness import difference

pytestmark = pytest.mark.integration

TRANSITIONS = int(os.environ.get("NEXA_SOAK_TRANSITIONS", "1000"))
STEPS = 30
PARTS = 8
"""hypothesis draws only so much a test."""
SETTLED_SECONDS = 30
LEAVES = sorted(leaves())
MUTABLE: tuple[Leaf, ...] = (("schedule", "suspend"), ("cluster", "numNodes"))
DEFAULTS = Defaults(image="trainer:test")


@pytest.fixture(scope="module")
def lane(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    folder = tmp_path_factory.mktemp("any")
    with new_lane(control_plane, prepare_operator(control_plane, folder), folder / "lane") as lane:
        yield lane


def expected_of(body: dict[str, Any]) -> tuple[Job | None, str]:
    """The job if this operator can carry it out, else the reason that its condition must give."""
    try:
        job = parse(body)
        image_of(job, DEFAULTS)
    except ConfigError:
        return None, "ConfigRejected"
    except RuntimeUnavailableError:
        return None, "RuntimeUnavailable"
    return job, ""


def says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", 0, {}, [])


def parts_of(wanted: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What is neither a map nor a list with anything in it, and where it stands."""
    inside = enumerate(wanted) if isinstance(wanted, list) else wanted.items() if isinstance(wanted, dict) else ()
    for key, value in inside:
        yield from parts_of(value, (*path, key))
    if not wanted or not isinstance(wanted, dict | list):
        yield path, wanted


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy in which that stands there; None: nothing does."""
    changed = copy.deepcopy(document)
    *way, last = path
    inside = changed
    for key in way:
        inside = inside[key]
    inside[last] = value
    return changed


def test_what_is_zero_false_or_empty_is_compared_like_all_else() -> None:
    """Of a gang as it is made: found where it is another, and where it is missing though the server would keep it."""
    volumes = [{"name": "rows", "mountPath": "/rows", "claim": "rows", "readOnly": False}]
    spec = {"data": {"remoteUri": "s3://rows"}, "artifacts": {"uri": "s3://models"}}
    spec["cluster"] = {"volumes": volumes, "env": [{"name": "EMPTY", "value": ""}]}
    job = Job.model_validate({"metadata": {"name": "j", "namespace": "n"}, "spec": spec})
    wanted = runtime.gang(make_plan(job, owner_uid="u", attempt=0, defaults=DEFAULTS))
    nothings = {path: value for path, value in parts_of(wanted) if says_nothing(value)}
    others = {bool: True, int: 7, str: "other", dict: {"added": "x"}, list: ["added"]}
    for path, value in nothings.items():
        assert difference(put(wanted, path, others[type(value)]), wanted), path
    left_out = {path[-1] for path in nothings if not difference(put(wanted, path, None), wanted)}
    assert left_out == {"annotations", "readOnly", "value"}
    compared = {"backoffLimit", "automountServiceAccountToken", "enableServiceLinks", "allowPrivilegeEscalation"}
    assert compared <= {path[-1] for path in nothings} - left_out
    assert difference(wanted, wanted) == ""


class AnyJob(RuleBasedStateMachine):
    """Creates jobs and changes them; after each step the cluster must agree with the specs."""

    lane: Lane
    counts: Counter[str]
    numbers: Iterator[int]

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @rule(spec=specs())
    def create(self, spec: Spec) -> None:
        name = f"any-{next(self.numbers)}"
        if not create_job(self.lane.api, self.lane.namespace, name, spec):
            return
        self.names.append(name)
        self.settle("create", name)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), leaf=st.sampled_from(LEAVES))
    def change_a_leaf(self, data: st.DataObject, leaf: Leaf) -> None:
        name = self.pick(data)
        change(self.lane, name, leaf, data)
        self.settle("change", name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def suspend_or_resume(self, data: st.DataObject) -> None:
        name = self.pick(data)
        spec = body_of(self.lane, name)["spec"]
        self.lane.change(name, schedule={"suspend": not spec["schedule"]["suspend"]})
        self.settle("suspend", name)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), phase=st.sampled_from(["Running", "Failed", "Succeeded"]))
    def play(self, data: st.DataObject, phase: str) -> None:
        """All pods of a gang run or end well, or one of them fails."""
        name = self.pick(data)
        status = self.lane.status(name)
        if {"Succeeded", "Failed"} & {kind for kind, value in conditions(status).items() if value == "True"}:
            return
        gang = f"{name}-a{status.get('attempt', 0)}"
        pods = [pod for pod in self.lane.pods(gang) if is_up(pod)]
        for pod in pods[: 1 if phase == "Failed" else None]:
            path = self.lane.path("pods", pod["metadata"]["name"]) + "/status"
            self.lane.api.merge(path, {"status": pod_status(phase)})
        if pods and phase == "Failed":
            self.lane.wait(lambda: self.lane.status(name) != status, f"{name} hears of its loss")
        self.settle(phase, name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.lane.api.delete(self.lane.path("nexatrainingjobs", name))
        self.names.remove(name)
        labels = f"train.nexa.dev/job-name={name}"
        self.lane.wait(
            lambda: not any(self.lane.api.list(self.lane.path(kind), labels=labels) for kind in ("jobs", "services")),
            f"{name}: children are gone",
        )
        self.counts["delete"] += 1

    def teardown(self) -> None:
        for name in self.names:
            self.lane.api.delete(self.lane.path("nexatrainingjobs", name))

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.names))

    def settle(self, what: str, name: str) -> None:
        self.counts[what] += 1
        settle(self.lane, name)
        labels = f"train.nexa.dev/job-name={name}"
        self.counts["with a live gang"] += bool(self.lane.api.list(self.lane.path("jobs"), labels=labels))


def is_up(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] in ("Pending", "Running")


def body_of(lane: Lane, name: str) -> dict[str, Any]:
    body = lane.api.get(lane.path("nexatrainingjobs", name))
    assert body is not None, name
    return body


def settle(lane: Lane, name: str) -> None:
    wait_until(
        lambda: wrong(lane, body_of(lane, name)) == "",
        timeout_seconds=SETTLED_SECONDS,
        what=f"{name} is as its spec says",
        detail=lambda: f"{wrong(lane, body_of(lane, name))}\n{json.dumps(body_of(lane, name), indent=1)}",
    )


def change(lane: Lane, name: str, leaf: Leaf, data: st.DataObject) -> None:
    """Another value for that leaf: carried out or refused, as it may."""
    old = body_of(lane, name)["spec"]
    new = data.draw(changed(old, leaf))
    refused = replace(lane, name, new)
    if refused is not None and "ValidatingAdmissionPolicy" in refused.message:
        assert leaf == ("cluster", "numNodes"), f"{leaf}: {refused}"
        assert expected_of({**body_of(lane, name), "spec": new})[0] is None, f"{leaf}: {refused}"
        return
    assert may_change(old, new, leaf) == (refused is None), f"{leaf}: {refused}"
    if refused is not None:
        assert refused.status == 422, f"{leaf}: {refused}"
        assert "immutable" in refused.message or leaf in MUTABLE, f"{leaf}: {refused}"


def replace(lane: Lane, name: str, spec: Spec) -> Refused | None:
    """Again where the operator wrote status in between."""
    while True:
        try:
            lane.api.replace(lane.path("nexatrainingjobs", name), {**body_of(lane, name), "spec": spec})
        except Refused as refused:
            if refused.status != 409:
                return refused
        else:
            return None


def may_change(old: Spec, new: Spec, leaf: Leaf) -> bool:
    """The two that may: suspend always, numNodes while suspended and where the batch still divides."""
    if leaf == ("schedule", "suspend"):
        return True
    return leaf == ("cluster", "numNodes") and old["schedule"]["suspend"] and is_valid(new)


def wrong(lane: Lane, body: dict[str, Any]) -> str:
    """What in the cluster is not as this job says; empty when all is."""
    job, refusal = expected_of(body)
    status = body.get("status", {})
    labels = f"train.nexa.dev/job-uid={body['metadata']['uid']}"
    gangs = lane.api.list(lane.path("jobs"), labels=labels)
    if not is_ours(body):
        return "touched, though another's" if status or gangs else ""
    true = {kind for kind, value in conditions(status).items() if value == "True"}
    reasons = {item["type"]: item["reason"] for item in status.get("conditions", []) if item["status"] == "True"}
    reason = reasons.get("Failed", "")
    if body["spec"]["schedule"]["runtime"] != "job":
        # Whether its CRD is installed here is for others to test; without, a condition says so.
        return "" if gangs or true & {"Failed", "Queued", "Suspended"} else f"no word: {true}"
    if job is None and not gangs and refusal in (reason, reasons.get("Queued")):
        return ""
    if job is None:
        return "" if "Suspended" in true and not gangs else f"not refused: {reasons}"
    plan = plan_of(job, body)
    if "Succeeded" in true or ("Failed" in true and reason in ("RestartsExhausted", "Killed")):
        return ""
    if "Failed" in true:
        can_never_be = reason == "ConfigRejected" and is_invalid(lane, runtime.gang(plan))
        return "" if can_never_be else f"failed: {reason} {status}"
    if status.get("observedGeneration") != body["metadata"]["generation"]:
        return "not looked at"
    if job.spec.schedule.suspend:
        stopped = all(gang["spec"].get("suspend") for gang in gangs)
        return "" if stopped and "Suspended" in true else f"not suspended: {true}"
    if status.get("nextAttemptTime") and not gangs:
        return ""
    objects = runtime.objects(plan)
    if [gang["metadata"]["name"] for gang in gangs] != [plan.name]:
        return f"gangs {[gang['metadata']['name'] for gang in gangs]}, expected {plan.name}"
    if gangs[0]["spec"].get("suspend"):
        return "still suspended"
    live = [lane.api.get(lane.path(kind.plural, document["metadata"]["name"])) for kind, document in objects]
    return next(filter(None, (difference(has, document) for has, (_, document) in zip(live, objects, strict=True))), "")


def plan_of(job: Job, body: dict[str, Any]) -> RunPlan:
    record = read_record(body.get("status", {}))
    return make_plan(
        job,
        owner_uid=body["metadata"]["uid"],
        attempt=record.attempt,
        defaults=DEFAULTS,
        num_nodes=record.num_nodes if job.spec.cluster.min_nodes else None,
        excluded_nodes=record.excluded_nodes,
        out_of_memory_attempt=record.out_of_memory_attempt,
    )


def is_invalid(lane: Lane, gang: dict[str, Any]) -> bool:
    """Whether the server can never take it, which no schema of ours can know in all cases."""
    try:
        lane.api.create(lane.path("jobs") + "?dryRun=All", gang)
    except Refused as refused:
        return refused.status == 422
    return False


def run_machine(lane: Lane, *, num_runs: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    # Attributes of a class made for this run: hypothesis makes the instances.
    machine = type("Machine", (AnyJob,), {"lane": lane, "counts": counts, "numbers": itertools.count()})
    run_state_machine_as_test(machine, settings=settings_of(max_examples=num_runs, stateful_step_count=STEPS))
    assert lane.alive
    assert not [said for said in lane.operator.said if said["event"] == "look failed" and "exception" in said]
    return counts


@pytest.mark.parametrize("part", range(PARTS))
def test_every_leaf_is_changed_and_only_two_may_be(lane: Lane, part: int) -> None:
    """Of jobs that are suspended, when the most is allowed."""
    numbers, leaves_of_part = itertools.count(), LEAVES[part::PARTS]

    @settings_of(max_examples=2)
    @given(spec=specs(), data=st.data())
    def changes(spec: Spec, data: st.DataObject) -> None:
        name = f"leaf-{part}-{next(numbers)}"
        suspended = {**spec, "schedule": {**spec.get("schedule", {}), "suspend": True}}
        assume(create_job(lane.api, lane.namespace, name, suspended))
        settle(lane, name)
        for leaf in leaves_of_part:
            change(lane, name, leaf, data)
        settle(lane, name)
        lane.api.delete(lane.path("nexatrainingjobs", name))

    changes()
    assert next(numbers) >= 1


def test_any_job_and_any_change(lane: Lane) -> None:
    counts = run_machine(lane, num_runs=3)
    assert counts.total() - counts["with a live gang"] >= 20, counts
    assert counts["with a live gang"], counts


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_thousand_changes(lane: Lane) -> None:
    counts = run_machine(lane, num_runs=TRANSITIONS * 3 // STEPS)  # most runs are shorter than they may be
    alive = counts.pop("with a live gang")
    print(f"{counts.total()} transitions, {alive} of them ended with a live gang: {dict(counts)}")
    assert counts.total() >= TRANSITIONS
    assert alive >= TRANSITIONS // 5
