"""A job that takes its artifacts with it: its ranks end first, and it is never held for ever."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_operator import naming, parting
from nexa_operator.errors import InvalidError
from nexa_operator.kinds import EVENTS, JOBS, PODS, TRAINING_JOBS, Kind
from nexa_operator.parting import Await, Clear, LetGo, Remove, holds, next_step, patience_seconds, wants_hold
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.reading import Ref
from nexa_operator.runtimes import beside
from tests.unit.operator.builders import GANG_UID, LATER, NOW, UID, body, condition, gang_job, job, pod
from tests.unit.operator.world import Operator, World

DELETED = "2026-11-23T12:00:00Z"


def deleted(**metadata: Any) -> dict[str, Any]:
    document = body(schedule={"deletionPolicy": "Delete"})
    document["metadata"] |= {"finalizers": [naming.FINALIZER], "deletionTimestamp": DELETED, **metadata}
    return document


def step(*, spans: str = "1", **given: Any) -> parting.Step:
    document = deleted(annotations={naming.ANNOTATION_SPANS: spans})
    return next_step(document, **{"gangs": [], "jobs": [], "pods": [], "now": NOW, **given})


def removal(*conditions: dict[str, str]) -> dict[str, Any]:
    document = gang_job(conditions=list(conditions))
    document["metadata"] |= {"name": "demo-removal", "labels": {naming.LABEL_ROLE: naming.ROLE_REMOVAL}}
    return document


def test_only_jobs_that_say_so_are_held() -> None:
    assert not wants_hold(body())
    assert wants_hold(body(schedule={"deletionPolicy": "Delete"}))
    assert not wants_hold(deleted())
    assert holds(deleted())
    assert not wants_hold(deleted(finalizers=[])), "too late to hold it"


def test_a_finalizer_that_somebody_else_put_on_removes_nothing() -> None:
    document = deleted()
    document["spec"]["schedule"]["deletionPolicy"] = "Retain"
    step = next_step(document, gangs=[], jobs=[], pods=[], now=NOW)
    assert isinstance(step, LetGo)
    assert "deletionPolicy" in step.problem


def test_a_job_is_held_for_as_long_as_its_ranks_are_given_and_one_of_before_the_key_for_the_usual_time() -> None:
    longer = deleted()
    longer["spec"]["recovery"] = {"gracePeriodSeconds": 3600}
    assert patience_seconds(longer) - patience_seconds(deleted()) == 3600 - 120


def test_gangs_end_before_anything_is_removed() -> None:
    assert step(gangs=[gang_job()]) == Clear(gangs=(Ref("demo-a0", GANG_UID),))
    going = gang_job()
    going["metadata"]["deletionTimestamp"] = DELETED
    assert step(gangs=[going]) == Remove()


def test_ranks_that_may_still_commit_are_waited_for_but_not_those_of_a_dead_node() -> None:
    assert step(pods=[pod()]) == Await()
    committing = pod(deleting=True)
    committing["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:30Z"
    assert step(pods=[committing]) == Await()
    assert step(pods=[committing], now=LATER) == Remove()
    assert step(pods=[pod(phase="Failed")]) == Remove()


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ((), Await()),
        ((condition("Complete"),), LetGo()),
        ((condition("Failed", message="deadline"),), LetGo(problem="demo-removal failed: deadline")),
    ],
)
def test_the_job_goes_when_the_removal_has_ended_however_that_was(ended: Any, expected: parting.Step) -> None:
    assert step(jobs=[removal(*ended)]) == expected


def test_a_job_is_held_for_a_bounded_time_whatever_happens() -> None:
    for world in ({"gangs": [gang_job()]}, {"pods": [pod()]}, {"jobs": [removal()]}):
        assert not isinstance(step(**world, spans="13"), LetGo)
        got = step(**world, spans="14")
        assert isinstance(got, LetGo)
        assert got.problem
    assert step(jobs=[removal(condition("Complete"))], spans="14") == LetGo(), "it was done while nobody looked"


@pytest.mark.parametrize("told", ["", "many", "-1", "1e3", "\u0663", "9" * 20])
def test_a_word_that_is_no_number_of_spans_is_none(told: str) -> None:
    assert parting.spans_of(deleted(annotations={naming.ANNOTATION_SPANS: told})) == 0
    assert parting.spans_of(deleted()) == 0


def test_the_pod_that_removes_has_the_store_and_no_gpu() -> None:
    described = job(cluster={"numNodes": 2, "gpusPerNode": 8}, training={"globalBatchSize": 16})
    plan = make_plan(described, owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1", storage="default"))
    document = beside.removal(plan)
    (container,) = document["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "nexa_train.removal"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert [item["value"] for item in container["env"] if item["name"] == "NVIDIA_VISIBLE_DEVICES"] == ["void"]
    assert container["envFrom"][1] == {"secretRef": {"name": "nexa-storage-default"}}
    assert document["spec"]["completions"] == 1
    assert document["metadata"]["ownerReferences"][0]["uid"] == UID


def test_pods_that_ask_for_room_are_placed_like_those_of_the_gang_and_know_no_secret() -> None:
    described = job(cluster={"numNodes": 4, "minNodes": 1, "nodeSelector": {"pool": "a"}, "gpusPerNode": 2})
    plan = make_plan(
        described, owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1", storage="default"), num_nodes=2,
        excluded_nodes=("n7", "n8"),
    )  # fmt: skip
    document = beside.room(plan, num_pods=2)
    spec = document["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert (document["metadata"]["name"], document["spec"]["parallelism"]) == ("demo-a3-room", 2)
    assert (spec["nodeSelector"], container["resources"]["limits"]) == ({"pool": "a"}, {"nvidia.com/gpu": "2"})
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [field["values"] for field in terms[0]["matchFields"]] == [["n7"], ["n8"]]
    assert "envFrom" not in container
    assert container["env"] == [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}]
    assert spec["terminationGracePeriodSeconds"] == 0


def world_with_a_job_that_parts() -> World:
    world = World()
    world.put(TRAINING_JOBS, deleted())
    return world


def hung_pods(world: World) -> None:
    """Of a node that nobody asks: they are there for ever."""
    labels = {naming.LABEL_JOB_UID: UID}
    world.put(PODS, {"metadata": {"name": "demo-a0-0-x", "labels": labels}, "status": {"phase": "Running"}})


class Strict(World):
    """It takes no Job of these."""

    async def create(self, kind: Kind, body: dict[str, Any]) -> bool:
        if kind == JOBS:
            self._note("create", kind, body["metadata"]["name"])
            raise InvalidError("POST", status=422, message="Job.batch is invalid: spec.template")
        return await super().create(kind, body)


@pytest.mark.anyio
async def test_a_job_whose_removal_the_server_can_never_take_is_let_go_at_once_in_its_words() -> None:
    world = Strict()
    world.put(TRAINING_JOBS, deleted())
    operator = Operator(world)
    await operator.look()
    assert operator.job["metadata"]["finalizers"] == []
    assert world.num_asked("create", JOBS) == 1
    (event,) = (each for (kind, _), each in world.objects.items() if kind == EVENTS.plural)
    assert event["reason"] == "ArtifactsLeft"
    assert "Job.batch is invalid" in event["message"]


@pytest.mark.anyio
async def test_what_ranks_committed_unheard_is_removed_from_where_they_were_told_to_put_it() -> None:
    world = World()
    world.put(TRAINING_JOBS, {**deleted(), "status": {"image": "trainer:1", "storage": "team"}})
    operator = Operator(world)
    operator.reconciler.defaults = Defaults(image="trainer:2", storage="another")
    await operator.look()
    await operator.look()
    (container,) = world.objects[JOBS.plural, "demo-removal"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"][1] == {"secretRef": {"name": "nexa-storage-team"}}


@pytest.mark.anyio
async def test_time_without_an_operator_is_not_what_ends_its_patience() -> None:
    world = world_with_a_job_that_parts()
    hung_pods(world)
    await Operator(world).look()
    world.pass_seconds(86_400)
    late = Operator(world)
    for _ in range(3):
        await late.look()
    assert late.job["metadata"]["finalizers"] == [naming.FINALIZER]


@pytest.mark.anyio
@pytest.mark.parametrize("restarts_every_look", [True, False])
async def test_the_hold_ends_also_where_operators_come_and_go(restarts_every_look: bool) -> None:
    world = world_with_a_job_that_parts()
    hung_pods(world)
    operator, looks = Operator(world), 0
    while operator.job["metadata"]["finalizers"] and looks < 1_000:
        operator = Operator(world) if restarts_every_look else operator
        await operator.look()
        looks += 1
        world.pass_seconds(parting.LOOK_SECONDS)
    assert operator.job["metadata"]["finalizers"] == []
    lasted = (world.now - NOW).total_seconds()
    assert lasted < 120 if restarts_every_look else abs(lasted - patience_seconds(operator.job)) < 90
