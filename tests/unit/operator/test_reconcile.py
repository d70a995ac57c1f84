"""Whole looks, one after the other, at a world in memory: what is asked of the server, and when it is looked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import generate_latest

from nexa_operator import naming
from nexa_operator.errors import ApiError, ConflictError, InvalidError
from nexa_operator.kinds import EVENTS, JOBS, JOBSETS, NODES, PODS, PYTORCHJOBS, TRAINING_JOBS, Kind
from nexa_operator.plan import Defaults
from nexa_operator.reconcile import Key
from nexa_operator.status import timestamp
from tests.unit.operator.builders import UID, body, checkpoint, condition, ended, words
from tests.unit.operator.world import Operator, World

pytestmark = pytest.mark.anyio


async def begun(world: World | None = None, **groups: Any) -> Operator:
    """Its gang is made, its pods are not."""
    operator = Operator(world or World(), **groups)
    await operator.look()
    if not operator.world.names(JOBS):
        await operator.look()  # the first one put a finalizer on the job
    assert operator.world.names(JOBS) == ["demo-a0"]
    return operator


async def running(**groups: Any) -> Operator:
    operator = await begun(**groups)
    operator.world.add_pods("demo-a0")
    await operator.look()
    assert "Running" in operator.true()
    return operator


def complete(world: World, gang: str = "demo-a0") -> None:
    world.objects[JOBS.plural, gang]["status"] = {"conditions": [condition("Complete")]}


def broken(world: World, gang: str = "demo-a0") -> None:
    """As bad data ends it."""
    world.remove(PODS)
    said = words(cause="DataError", exit_code=5, retryable=False).as_bytes().decode()
    world.add_pods(gang, phase="Failed", containerStatuses=ended(5, said))


async def test_a_job_is_read_from_memory_only_as_new_as_it_was_heard_of_or_written() -> None:
    operator = Operator(World())
    operator.reconciler.changed(operator.key, "7")
    await operator.look()
    written = operator.job["metadata"]["resourceVersion"]
    await operator.look()
    await operator.look()
    assert operator.world.not_older == ["7", written, ""], "a look that wrote nothing tells nothing to the next one"


async def test_a_change_that_is_heard_while_a_status_is_written_is_seen_by_the_next_look() -> None:
    world = Slow()
    operator = Operator(world)
    world.meanwhile = lambda: operator.reconciler.changed(operator.key, "1000")
    await operator.look()
    await operator.look()
    assert world.not_older == ["", "1000"]


async def test_nothing_is_listed_of_a_job_that_was_just_made_but_of_an_old_one_whose_status_was_lost() -> None:
    operator = await begun()
    assert operator.world.num_asked("list", JOBS) == operator.world.num_asked("list", PODS) == 0
    del operator.job["status"]
    operator.world.pass_seconds(60)
    operator.world.objects[JOBS.plural, "demo-a0"]["metadata"]["labels"][naming.LABEL_ATTEMPT] = "3"
    await operator.look()
    assert operator.job["status"]["attempt"] == 3
    assert operator.world.names(JOBS) == ["demo-a0"]


async def test_after_a_conflict_the_latest_is_asked_for() -> None:
    operator = await begun()
    operator.world.add_pods("demo-a0")
    operator.world.overtaken = True
    with pytest.raises(ConflictError):
        await operator.look()
    operator.world.overtaken = False
    await operator.look()
    assert operator.world.not_older[-2:] != ["", ""]
    assert operator.world.not_older[-1] == ""
    assert "Running" in operator.true()


async def test_a_failed_job_is_looked_at_again_though_nothing_tells_of_it() -> None:
    operator = await running(schedule={"ttlSecondsAfterFinished": 60})
    broken(operator.world)
    assert [seconds for seconds in await operator.look() if seconds < 6], "it is over"
    operator.world.pass_seconds(5)
    assert await operator.look() == [55.0], "and is to be deleted then"
    operator.world.pass_seconds(55)
    await operator.look()
    assert operator.world.get(TRAINING_JOBS, "demo") is None


async def test_a_job_that_leaves_nothing_is_looked_at_again_for_its_time_to_live_alone() -> None:
    operator = await running(schedule={"ttlSecondsAfterFinished": 60})
    complete(operator.world)
    assert await operator.look() == [60.0]
    assert operator.reconciler.is_over(operator.key)
    operator.world.pass_seconds(60)
    await operator.look()
    assert operator.world.get(TRAINING_JOBS, "demo") is None


async def test_no_appointment_is_kept_for_a_job_that_leaves_nothing() -> None:
    operator = await running()
    complete(operator.world)
    assert await operator.look() == []
    assert operator.queue.cancelled == [operator.key]


async def test_no_appointment_is_kept_for_a_job_that_is_gone() -> None:
    operator = await running()
    key = operator.key
    operator.world.objects.clear()
    await operator.reconciler.reconcile(key)
    assert operator.queue.cancelled == [key]


async def test_what_becomes_of_a_new_gang_is_looked_at_though_nothing_may_tell_of_it() -> None:
    operator = Operator(World())
    assert [seconds for seconds in await operator.look() if seconds < 6], "there are kinds that are not watched"


async def test_a_job_is_over_once_a_look_has_seen_that_nothing_is_left() -> None:
    operator = await running()
    gang = operator.world.objects[JOBS.plural, "demo-a0"]["metadata"]
    labels = {**gang["labels"], naming.LABEL_ATTEMPT: "none"}
    metadata = {"name": "left", "labels": labels, "ownerReferences": gang["ownerReferences"]}
    operator.world.put(JOBS, {"metadata": metadata})
    complete(operator.world)
    await operator.look()
    assert not operator.reconciler.is_over(operator.key)
    await operator.look()
    assert operator.reconciler.is_over(operator.key)


async def test_a_job_whose_gang_cannot_be_seen_is_not_over_and_what_runs_of_it_is_ended_when_it_can() -> None:
    """Its operator was killed after it had written that the job has failed."""
    world = World()
    operator = Operator(world, schedule={"runtime": "jobset"})
    await operator.look()
    (gang,) = world.names(JOBSETS)
    operator.job["status"] |= {"conditions": [condition("Failed", reason="DeadlineExceeded", message="")]}
    world.unserved = {JOBSETS}
    later = Operator(world)
    assert await later.look() == [60.0], "the kind may be served again"
    assert not later.reconciler.is_over(later.key)
    world.unserved = set()
    await later.look()
    assert world.names(JOBSETS) == []
    assert gang == "demo-a0"
    assert not later.reconciler.is_over(later.key)
    await later.look()
    assert later.reconciler.is_over(later.key)


async def test_a_job_that_was_over_and_is_no_more_is_not_taken_for_over() -> None:
    operator = await running(schedule={"deletionPolicy": "Delete"})
    complete(operator.world)
    await operator.look()
    await operator.look()
    assert operator.reconciler.is_over(operator.key)
    operator.job["metadata"]["finalizers"] = []
    await operator.look()
    assert not operator.reconciler.is_over(operator.key)
    assert operator.job["metadata"]["finalizers"] == [naming.FINALIZER]


async def test_why_pods_are_not_made_is_asked_only_once_they_are_late_and_then_seldom() -> None:
    operator = await begun()
    world = operator.world
    assert await operator.look() == [10.05], "nobody tells of what does not happen"
    world.pass_seconds(9)
    await operator.look()
    assert world.num_asked("list", EVENTS) == 0
    world.warnings = [{"message": 'Error creating: pods "demo-a0-0-x" is forbidden: quota', "metadata": {}}]
    world.pass_seconds(1)
    for _ in range(5):
        await operator.look()
        world.pass_seconds(5)
    assert world.num_asked("list", EVENTS) == 1
    assert operator.true()["Queued"] == "PodsRefused", "what was said last is remembered"
    world.warnings = [{"message": "another reason", "metadata": {}}]
    world.pass_seconds(5)
    await operator.look()
    assert world.num_asked("list", EVENTS) == 2
    assert "another reason" in str(operator.job["status"])


async def test_a_jobset_of_which_no_job_is_made_says_so_once_it_is_late_and_no_longer_than_that() -> None:
    operator = Operator(World(), schedule={"runtime": "jobset"})
    world = operator.world
    await operator.look()
    assert await operator.look() == [10.05]
    assert operator.true()["Queued"] == "Creating"
    world.pass_seconds(10)
    await operator.look()
    assert operator.true()["Queued"] == "PodsRefused"
    said = "JobSet's controller has made no Job of demo-a0 and gives no reason: look at its log"
    assert said in str(operator.job["status"])
    world.warnings = [{"message": "a webhook's words", "metadata": {}}]
    world.pass_seconds(30)
    await operator.look()
    assert "a webhook's words" in str(operator.job["status"]), "what is given as a reason counts more"
    gang, world.warnings = world.objects[JOBSETS.plural, "demo-a0"]["metadata"], []
    owner = {"kind": "JobSet", "uid": gang["uid"], "controller": True}
    metadata = {"name": "demo-a0-r-0", "labels": gang["labels"], "ownerReferences": [owner]}
    world.put(JOBS, {"metadata": metadata, "spec": {}})
    world.pass_seconds(30)
    await operator.look()
    assert said not in str(operator.job["status"]), "that its pods are late is another matter"


async def test_another_gang_s_refusal_is_asked_anew_and_silence_is_asked_about_again() -> None:
    operator = await begun()
    world = operator.world
    world.pass_seconds(10)
    assert 30.05 in await operator.look(), "no reason was given yet"
    world.remove(JOBS)
    await operator.look()
    world.pass_seconds(10)
    await operator.look()
    assert world.num_asked("list", EVENTS) == 2


class Slow(World):
    """While a look is under way somebody deletes the job and makes another of its name, and so is its gang called."""

    then: Kind | None = None
    meanwhile: Callable[[], None] | None = None

    async def patch(self, kind: Kind, body: dict[str, Any], *, subresource: str = "") -> dict[str, Any]:
        patched = await super().patch(kind, body, subresource=subresource)
        if self.meanwhile:
            self.meanwhile()
        if subresource and self.then:
            self.remove(self.then, "demo-a0")
            self.put(self.then, {"metadata": {"name": "demo-a0", "uid": "of-another-job"}, "spec": {}})
        return patched


async def test_a_slow_look_deletes_no_gang_of_a_namesake() -> None:
    world = Slow()
    operator = Operator(world)
    await operator.look()
    world.add_pods("demo-a0", phase="Failed", containerStatuses=ended(1))
    world.then = JOBS
    await operator.look()
    assert ("delete", "jobs", "demo-a0") in world.asked
    assert world.objects["jobs", "demo-a0"]["metadata"]["uid"] == "of-another-job"


async def test_a_slow_look_suspends_no_gang_of_a_namesake() -> None:
    world = Slow()
    operator = Operator(world)
    await operator.look()
    world.add_pods("demo-a0")
    await operator.look()
    operator.job["spec"]["schedule"] = {"suspend": True}
    world.then = JOBS
    with pytest.raises(InvalidError, match="uid"):
        await operator.look()
    assert world.objects["jobs", "demo-a0"]["spec"] == {}


async def test_a_job_is_suspended_once_its_ranks_are_gone_and_saving_until_then() -> None:
    operator = await running()
    world = operator.world
    operator.job["spec"]["schedule"] = {"suspend": True}
    looks = await operator.look()
    assert (operator.job["status"]["phase"], operator.true()) == ("Suspending", {"Reconciling": "Suspending"})
    assert min(looks) < 3, "nobody may tell of its pods"
    assert world.objects["jobs", "demo-a0"]["spec"]["suspend"] is True
    for pod in world.names(PODS):
        world.objects["pods", pod]["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:00Z"
    assert 120.05 in await operator.look()
    assert "Suspended" not in operator.true()
    world.remove(PODS, "demo-a0-0-x")
    await operator.look()
    assert "Suspended" not in operator.true()
    world.remove(PODS)
    await operator.look()
    assert operator.true() == {"Suspended": "Suspended", "Ready": "Suspended"}


async def test_a_job_is_not_suspended_while_a_rank_of_the_attempt_before_commits() -> None:
    operator = await running()
    world = operator.world
    world.objects[PODS.plural, "demo-a0-1-x"]["status"] |= {"phase": "Failed", "containerStatuses": ended(1)}
    await operator.look()
    world.pass_seconds(3)
    await operator.look()
    assert world.names(JOBS) == ["demo-a1"]
    operator.job["spec"]["schedule"] = {"suspend": True}
    await operator.look()
    assert min(await operator.look()) < 3, "it is not asked to go yet"
    assert operator.true() == {"Reconciling": "Suspending"}
    world.objects[PODS.plural, "demo-a0-0-x"]["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:03Z"
    assert 120.05 in await operator.look()
    assert operator.true() == {"Reconciling": "Suspending"}
    world.remove(PODS, "demo-a0-0-x")
    await operator.look()
    assert operator.true() == {"Suspended": "Suspended", "Ready": "Suspended"}


async def test_a_pod_that_hangs_on_a_silent_node_does_not_keep_a_job_from_being_suspended() -> None:
    operator = await running()
    operator.job["spec"]["schedule"] = {"suspend": True}
    await operator.look()
    for pod in operator.world.names(PODS):
        operator.world.objects["pods", pod]["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:00Z"
    operator.world.pass_seconds(120)
    await operator.look()
    assert "Suspended" in operator.true()


def suspend_gang(world: World, *, stands: bool) -> None:
    """As its queue does or somebody else, and its controller says then."""
    gang = world.objects[JOBS.plural, "demo-a0"]
    gang["spec"]["suspend"] = stands
    said = {"type": "Suspended", "status": str(stands), "lastTransitionTime": timestamp(world.now)}
    gang["status"] = {"conditions": [said]}


async def smaller_with_room(world: World | None = None) -> Operator:
    """One pod of two runs, and a pod beside it has found room for the other."""
    operator = await begun(world, cluster={"numNodes": 2, "minNodes": 1})
    world = operator.world
    operator.job["status"] |= {"numNodes": 1}
    world.objects["jobs", "demo-a0"]["metadata"]["labels"][naming.LABEL_NODES] = "1"
    world.add_pods("demo-a0", count=1)
    await operator.look()
    assert world.names(JOBS) == ["demo-a0", "demo-a0-room"]
    found = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-23T12:00:00Z"}
    world.add_pods("demo-a0-room", count=1, conditions=[found])
    await operator.look()
    assert world.objects["jobs", "demo-a0"]["spec"]["suspend"] is True
    world.remove(PODS, "demo-a0-0-x")
    return operator


async def test_room_is_kept_until_the_larger_gang_stands_in_line_for_it() -> None:
    operator = await smaller_with_room()
    world = operator.world
    assert 1.05 in await operator.look()
    assert world.objects["jobs", "demo-a1"]["spec"]["completions"] == 2
    assert "demo-a0-room" in world.names(JOBS), "else another job's pods take it"
    assert 1.05 in await operator.look()
    assert "demo-a0-room" in world.names(JOBS)
    world.add_pods("demo-a1", phase="Pending")
    await operator.look()
    assert world.names(JOBS) == ["demo-a1"]


async def test_room_of_which_the_job_can_make_nothing_is_given_up_for_a_while() -> None:
    """Two pods of four run, beside them one that has found room: 8 rows over 3 pods do not go."""
    elastic = {"numNodes": 4, "minNodes": 2, "shrinkAfterSeconds": 60}
    operator = await begun(cluster=elastic, training={"globalBatchSize": 8})
    world = operator.world
    operator.job["status"] |= {"numNodes": 2}
    world.objects["jobs", "demo-a0"]["metadata"]["labels"][naming.LABEL_NODES] = "2"
    world.add_pods("demo-a0")
    await operator.look()
    found = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-23T12:00:00Z"}
    world.add_pods("demo-a0-room", count=1, conditions=[found])
    world.pass_seconds(59)
    assert 60.05 in await operator.look()
    assert world.names(JOBS) == ["demo-a0", "demo-a0-room"]
    world.pass_seconds(1)
    assert 600.05 in await operator.look()
    assert world.names(JOBS) == ["demo-a0"], "others can use that node"
    world.remove(PODS, "demo-a0-room-0-x")
    world.pass_seconds(599)
    assert 1.05 in await operator.look()
    assert world.names(JOBS) == ["demo-a0"]
    world.pass_seconds(1)
    await operator.look()
    assert world.names(JOBS) == ["demo-a0", "demo-a0-room"]


async def test_an_operator_that_was_away_while_it_kept_room_gives_the_larger_gang_time_to_take_it() -> None:
    operator = await smaller_with_room()
    await operator.look()
    refused = {"type": "PodScheduled", "status": "False", "lastTransitionTime": "2026-11-23T12:00:00Z"}
    operator.world.add_pods("demo-a1", phase="Pending", conditions=[refused])
    operator.world.objects["pods", "demo-a1-0-x"] |= {"spec": {"nodeName": "n"}, "status": {"phase": "Pending"}}
    operator.world.pass_seconds(300)
    assert 60.05 in await operator.look()
    assert operator.world.names(JOBS) == ["demo-a1"], "the room is given up, its attempt is not"
    operator.world.pass_seconds(59)
    await operator.look()
    assert operator.world.names(JOBS) == ["demo-a1"]
    operator.world.pass_seconds(1)
    await operator.look()
    assert operator.world.names(JOBS) == ["demo-a2"]


async def test_room_is_not_kept_for_a_gang_that_is_refused() -> None:
    world = Denying()
    operator = await smaller_with_room(world)
    world.denies = ApiError
    with pytest.raises(ApiError):
        await operator.look()
    assert "demo-a0-room" in world.names(JOBS), "of the larger gang, which is tried now"
    with pytest.raises(ApiError):
        await operator.look()
    assert world.names(JOBS) == []


async def test_room_is_kept_while_ranks_commit() -> None:
    operator = await smaller_with_room()
    world = operator.world
    operator.job["status"]["conditions"] = [condition("Queued", reason="Resizing", message="")]
    world.add_pods("demo-a0", count=1)
    world.objects[PODS.plural, "demo-a0-0-x"]["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:00Z"
    await operator.look()
    assert operator.true()["Queued"] == "Stopping"
    assert "demo-a0-room" in world.names(JOBS)


async def test_no_room_is_kept_for_a_gang_that_somebody_else_suspends() -> None:
    operator = await begun(cluster={"numNodes": 2, "minNodes": 1})
    world = operator.world
    world.objects[JOBS.plural, "demo-a0"]["metadata"]["labels"][naming.LABEL_NODES] = "1"
    world.add_pods("demo-a0", count=1)
    await operator.look()
    assert "demo-a0-room" in world.names(JOBS)
    suspend_gang(world, stands=True)
    await operator.look()
    assert operator.true()["Queued"] == "SuspendedByAnother"
    assert world.names(JOBS) == ["demo-a0"], "nobody knows for how long"


async def test_room_is_not_kept_for_pods_that_may_not_be_made_beside_it() -> None:
    operator = await smaller_with_room()
    await operator.look()
    operator.world.pass_seconds(10)
    await operator.look()
    assert operator.world.names(JOBS) == ["demo-a1"], "a quota counts both"


async def test_progress_is_written_with_the_time_that_has_passed_and_that_alone_writes_nothing() -> None:
    operator = await running()
    world = operator.world
    before = world.num_asked("patch", TRAINING_JOBS)
    for _ in range(10):
        world.pass_seconds(600)
        await operator.look()
    assert world.num_asked("patch", TRAINING_JOBS) == before
    operator.job["metadata"]["generation"] = 2
    await operator.look()
    assert operator.job["status"]["goodput"]["startupSeconds"] == 6_000.0


async def resync(operator: Operator, *, acts: bool = True) -> None:
    gate = asyncio.Event()
    if acts:
        gate.set()
    task = asyncio.create_task(operator.reconciler.resync_forever(namespace="", interval_seconds=60, may_act=gate))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done(), task.exception()
    task.cancel()


async def test_who_may_not_act_counts_all_jobs_and_looks_at_none() -> None:
    operator = await running()
    await resync(operator, acts=False)
    assert len(operator.queue) == 0
    assert b'nexa_jobs{phase="Running"} 1.0' in generate_latest(operator.metrics.registry)
    await resync(operator)
    assert len(operator.queue) == 1


async def test_a_status_that_nobody_can_read_ends_no_resync_and_hides_no_other_job() -> None:
    operator = await running()
    other = body(status={"goodput": "none", "attempt": "first", "conditions": [{"type": "Failed"}]})
    other["metadata"] |= {"name": "a-strange-one", "uid": "strange"}
    operator.world.put(TRAINING_JOBS, other)
    await resync(operator)
    assert len(operator.queue) == 2
    assert await operator.queue.take() == Key("team", "a-strange-one", "strange")
    assert await operator.queue.take() == Key("team", "demo", UID)


async def test_a_resync_that_the_server_refuses_ends_nothing() -> None:
    operator = await running()
    operator.world.unserved = {TRAINING_JOBS}
    await resync(operator)


def break_on(world: World, node: str) -> None:
    """A rank ends there without a word, and so does the other one."""
    world.remove(PODS)
    world.add_pods("demo-a0", phase="Failed", containerStatuses=ended(137, "", reason="Error"))
    for name in world.names(PODS):
        world.objects[PODS.plural, name]["spec"] = {"nodeName": node}


async def test_a_node_is_asked_only_where_a_rank_was_lost_and_kept_off_where_it_says_that_it_is_broken() -> None:
    operator = await running()
    assert operator.world.num_asked("get", NODES) == 0
    conditions = [condition("Ready"), condition("KernelDeadlock")]
    operator.world.put(NODES, {"metadata": {"name": "n7"}, "status": {"conditions": conditions}})
    break_on(operator.world, "n7")
    operator.world.pass_seconds(5)
    await operator.look()
    status = operator.job["status"]
    assert status["excludedNodes"] == ["n7"]
    assert "node n7: KernelDeadlock" in status["lastFailure"]["message"]
    assert operator.world.num_asked("get", NODES) >= 1


async def test_without_an_answer_about_the_node_another_attempt_is_made_all_the_same() -> None:
    operator = await running()
    break_on(operator.world, "n7")
    operator.world.refused.add(NODES)
    operator.world.pass_seconds(5)
    await operator.look()
    assert (operator.job["status"]["restarts"], operator.job["status"]["chargedRestarts"]) == (1, 1)


async def test_a_job_that_is_over_asks_for_no_node_however_often_it_is_looked_at() -> None:
    operator = await running(recovery={"maxRestarts": 0}, schedule={"ttlSecondsAfterFinished": 600})
    operator.world.put(NODES, {"metadata": {"name": "n7"}, "status": {"conditions": [condition("Ready")]}})
    break_on(operator.world, "n7")
    operator.world.pass_seconds(5)
    await operator.look()
    assert "Failed" in operator.true()
    asked = operator.world.num_asked("get", NODES)
    assert asked > 0
    for _ in range(3):
        operator.world.pass_seconds(60)
        await operator.look()
    assert operator.world.num_asked("get", NODES) == asked


async def test_an_operator_of_one_namespace_asks_for_no_node() -> None:
    operator = await running(reads_nodes=False)
    break_on(operator.world, "gone")
    operator.world.pass_seconds(5)
    await operator.look()
    assert operator.job["status"]["restarts"] == 1
    assert operator.world.num_asked("get", NODES) == 0


async def test_why_a_rank_was_lost_is_not_forgotten_when_its_pod_goes_before_the_others_have_ended() -> None:
    operator = await running()
    first, second = (operator.world.objects[PODS.plural, name] for name in operator.world.names(PODS))
    second["status"] |= {"phase": "Failed", "conditions": [condition("DisruptionTarget", reason="DeletionByPodGC")]}
    await operator.look()
    assert "Running" in operator.true(), "the other may still say why"
    operator.world.remove(PODS, second["metadata"]["name"])
    said = words(cause="RuntimeError", message="Connection reset by peer").as_bytes().decode()
    first["status"] |= {"phase": "Failed", "containerStatuses": ended(1, said)}
    operator.world.pass_seconds(3)
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 0, "Disrupted")


def fail_by_itself(operator: Operator, name: str) -> None:
    said = words(cause="RuntimeError", message="Connection reset by peer").as_bytes().decode()
    operator.world.objects[PODS.plural, name]["status"] |= {"phase": "Failed", "containerStatuses": ended(1, said)}


@pytest.mark.parametrize("gone", [True, False], ids=["and is gone", "and is killed for it"])
async def test_a_rank_that_was_asked_to_go_before_any_had_failed_explains_why_another_fails_of_that(gone: bool) -> None:
    operator = await running()
    second = operator.world.objects[PODS.plural, "demo-a0-1-x"]
    second["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:01Z"
    await operator.look()
    if gone:
        operator.world.remove(PODS, "demo-a0-1-x")
    else:
        second["status"] |= {"phase": "Failed", "containerStatuses": ended(137)}
    fail_by_itself(operator, "demo-a0-0-x")
    operator.world.pass_seconds(3)
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 0, "PodDeleted")


def add_worker(world: World, index: int, phase: str) -> None:
    """As training-operator makes it."""
    gang = world.objects[PYTORCHJOBS.plural, "demo-a0"]["metadata"]
    labels = {**gang["labels"], "training.kubeflow.org/replica-index": str(index)}
    owners = [{"kind": "PyTorchJob", "uid": gang["uid"], "controller": True}]
    metadata = {"name": f"demo-a0-worker-{index}", "labels": labels, "ownerReferences": owners}
    world.put(PODS, {"metadata": metadata, "status": {"phase": phase}})


async def test_a_pod_that_follows_one_that_is_gone_is_not_taken_for_it_once_it_runs() -> None:
    operator = Operator(World(), schedule={"runtime": "pytorchjob"})
    world = operator.world
    await operator.look()
    for index in (0, 1):
        add_worker(world, index, "Running")
    await operator.look()
    assert "Running" in operator.true()
    world.remove(PODS, "demo-a0-worker-1")
    add_worker(world, 1, "Pending")
    await operator.look()
    world.objects[PODS.plural, "demo-a0-worker-1"]["status"]["phase"] = "Running"
    world.pass_seconds(2)
    await operator.look()
    assert operator.job["status"]["attempt"] == 0, "the other may still say why"
    world.pass_seconds(1)
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 0, "PodDeleted")


async def test_a_rank_that_is_asked_to_go_once_another_has_failed_explains_nothing() -> None:
    operator = await running()
    fail_by_itself(operator, "demo-a0-0-x")
    await operator.look()
    second = operator.world.objects[PODS.plural, "demo-a0-1-x"]
    second["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:00Z"
    await operator.look()
    operator.world.remove(PODS, "demo-a0-1-x")
    operator.world.pass_seconds(3)
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["chargedRestarts"], status["lastFailure"]["cause"]) == (1, 1, "RuntimeError")


async def test_a_drained_rank_that_is_gone_is_waited_for_no_longer() -> None:
    """Whatever time it was given: its pod was deleted by force."""
    operator = await running(recovery={"gracePeriodSeconds": 3600})
    second = operator.world.objects[PODS.plural, operator.world.names(PODS)[1]]
    second["metadata"]["deletionTimestamp"] = "2026-11-23T13:00:00Z"
    second["status"]["conditions"] = [condition("DisruptionTarget", reason="EvictionByEvictionAPI")]
    operator.world.pass_seconds(3)
    await operator.look()
    assert operator.job["status"]["attempt"] == 0, "it commits"
    operator.world.remove(PODS, second["metadata"]["name"])
    operator.world.pass_seconds(3)
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["lastFailure"]["cause"], status["chargedRestarts"]) == (1, "Disrupted", 0)


async def test_a_job_is_done_though_a_rank_was_drained_as_it_ended_well_and_only_what_it_was_before_is_known() -> None:
    operator = await running()
    world = operator.world
    first, second = (world.objects[PODS.plural, name] for name in world.names(PODS))
    second["metadata"]["deletionTimestamp"] = "2026-11-23T12:02:00Z"
    second["status"]["conditions"] = [condition("DisruptionTarget", reason="EvictionByEvictionAPI")]
    await operator.look()
    first["status"] |= {"phase": "Succeeded"}
    world.remove(PODS, second["metadata"]["name"])
    complete(world)
    world.pass_seconds(5)
    await operator.look()
    assert operator.true()["Succeeded"] == "Finished"
    assert operator.job["status"]["attempt"] == 0


@pytest.mark.parametrize(
    "seen_before",
    [
        {"metadata": {"deletionTimestamp": "2026-11-23T12:02:00Z"}},
        {"status": {"phase": "Failed", "conditions": [condition("DisruptionTarget", reason="EvictionByEvictionAPI")]}},
    ],
    ids=["driven out by another pod", "drained, and it had failed"],
)
async def test_what_was_seen_of_a_rank_that_cannot_have_ended_well_stands_against_a_success(
    seen_before: dict[str, Any],
) -> None:
    operator = await running()
    world = operator.world
    second = world.objects[PODS.plural, "demo-a0-1-x"]
    for group, values in seen_before.items():
        second[group] |= values
    await operator.look()
    world.objects[PODS.plural, "demo-a0-0-x"]["status"] |= {"phase": "Succeeded"}
    world.remove(PODS, "demo-a0-1-x")
    complete(world)
    world.pass_seconds(5)
    await operator.look()
    assert operator.job["status"]["attempt"] == 1


@pytest.mark.parametrize("queue", ["team", None], ids=["by its queue", "by somebody else"])
async def test_a_gang_that_was_suspended_and_let_go_is_not_ended_for_ranks_that_it_lost_before(
    queue: str | None,
) -> None:
    operator = await begun(schedule={"queueName": queue} if queue else {})
    world = operator.world
    suspend_gang(world, stands=False)
    world.pass_seconds(1)
    world.add_pods("demo-a0")
    await operator.look()
    assert "Running" in operator.true()
    world.pass_seconds(600)
    second = world.objects[PODS.plural, "demo-a0-1-x"]
    second["metadata"]["deletionTimestamp"] = "2026-11-23T13:00:00Z"
    second["status"]["conditions"] = [condition("DisruptionTarget", reason="EvictionByEvictionAPI")]
    await operator.look()
    assert "Running" in operator.true(), "it may still say why"
    suspend_gang(world, stands=True)
    await operator.look()
    second["status"] |= {"phase": "Failed", "containerStatuses": ended(137)}
    await operator.look()
    world.remove(PODS)
    world.pass_seconds(3600)
    suspend_gang(world, stands=False)
    world.pass_seconds(1)
    world.add_pods("demo-a0")
    await operator.look()
    assert ("Running" in operator.true(), operator.job["status"]["attempt"]) == (True, 0)
    assert world.names(JOBS) == ["demo-a0"]


async def test_the_image_and_the_storage_that_a_run_has_committed_something_with_are_kept() -> None:
    operator = await begun()
    world, reconciler = operator.world, operator.reconciler

    def carries_out() -> tuple[str, object]:
        (gang,) = [world.objects["jobs", name] for name in world.names(JOBS)]
        (container,) = gang["spec"]["template"]["spec"]["containers"]
        return container["image"], container.get("envFrom")

    async def lose_a_rank() -> None:
        world.remove(PODS)
        world.add_pods(world.names(JOBS)[0], phase="Failed", containerStatuses=ended(1))
        await operator.look()
        world.remove(PODS)
        operator.job["status"].pop("nextAttemptTime", None)
        await operator.look()

    assert carries_out() == ("trainer:1", None)
    reconciler.defaults = Defaults(image="trainer:2", storage="team")
    await lose_a_rank()
    image, storage = carries_out()
    assert (image, operator.job["status"]["image"]) == ("trainer:2", "trainer:2"), "nothing is committed yet"
    assert operator.job["status"]["storage"] == "team"
    operator.job["status"]["checkpoint"] = {"step": 50, "uri": "u", "digest": "d"}
    reconciler.defaults = Defaults(image="trainer:3", storage="another")
    await lose_a_rank()
    assert carries_out() == ("trainer:2", storage)
    assert operator.job["status"]["attempt"] == 2


async def test_the_first_checkpoint_keeps_what_it_was_committed_with_when_last_words_alone_tell_of_it() -> None:
    operator = await begun()
    operator.reconciler.defaults = Defaults(image="trainer:2", storage="team")
    operator.world.add_pods("demo-a0", count=1)
    said = words(cause="Stopped", exit_code=75, checkpoint=checkpoint(50)).model_dump_json()
    operator.world.add_pods("demo-a0", phase="Failed", containerStatuses=ended(75, said))
    await operator.look()
    status = operator.job["status"]
    assert (status["attempt"], status["checkpoint"]["step"]) == (1, 50)
    assert (status["image"], status.get("storage")) == ("trainer:1", None)


async def disrupted(operator: Operator) -> None:
    """The attempt is lost by no fault of the job, and the next one begins."""
    for name in operator.world.names(PODS):
        gone = {"phase": "Failed", "conditions": [condition("DisruptionTarget", reason="DeletionByTaintManager")]}
        operator.world.objects[PODS.plural, name]["status"] |= gone
    await operator.look()
    operator.world.remove(PODS)


def hours(operator: Operator) -> dict[str, int]:
    spent = operator.job["status"]["goodput"]
    return {key.removesuffix("Seconds"): round(spent[key] / 3600) for key in spent if key.endswith("Seconds")}


async def test_a_later_attempt_whose_pods_may_not_be_made_is_queued_too_and_not_on_the_job_s_clock() -> None:
    operator = await running(schedule={"activeDeadlineSeconds": 3600})
    await disrupted(operator)
    operator.world.warnings = [{"message": 'Error creating: pods "demo-a1-0-x" is forbidden: quota', "metadata": {}}]
    for _ in range(13):
        operator.world.pass_seconds(600)
        await operator.look()
    assert operator.true()["Queued"] == "PodsRefused"
    assert operator.job["status"]["goodput"]["state"] == "queue"
    operator.world.add_pods("demo-a1")
    await operator.look()
    assert "Running" in operator.true()
    assert hours(operator) == {"queue": 2, "startup": 0, "restart": 0}


async def test_a_later_attempt_whose_pods_no_scheduler_tries_is_queued_too() -> None:
    operator = await running(schedule={"activeDeadlineSeconds": 3600})
    await disrupted(operator)
    operator.world.add_pods("demo-a1", phase="Pending")
    soon = await operator.look()
    assert operator.job["status"]["goodput"]["state"] == "restart"
    operator.world.pass_seconds(min(soon))
    await operator.look()
    operator.world.pass_seconds(7200)
    await operator.look()
    assert operator.true()["Queued"] == "PodsPending"
    assert operator.job["status"]["goodput"]["state"] == "queue"


class Denying(World):
    """Denies every Job."""

    denies: type[ApiError] | None = None

    async def create(self, kind: Kind, body: dict[str, Any]) -> bool:
        if kind == JOBS and self.denies:
            raise self.denies("POST", status=422, message="not this week")
        return await super().create(kind, body)


async def test_what_a_policy_denies_is_tried_again_and_what_the_schema_does_not_take_is_not() -> None:
    world = Denying()
    world.denies = ApiError
    operator = Operator(world)
    for _ in range(2):
        with pytest.raises(ApiError):
            await operator.look()
    assert operator.true()["Queued"] == "Refused"
    assert "not this week" in str(operator.job["status"])
    world.denies = None
    await operator.look()
    assert world.names(JOBS) == ["demo-a0"]

    world = Denying()
    world.denies = InvalidError
    operator = Operator(world)
    with pytest.raises(InvalidError):
        await operator.look()
    await operator.look()
    assert operator.true()["Failed"] == "ConfigRejected"


async def test_a_later_attempt_that_is_refused_is_queued_too_and_not_on_the_job_s_clock() -> None:
    world = Denying()
    operator = Operator(world, schedule={"activeDeadlineSeconds": 3600})
    await operator.look()
    world.add_pods("demo-a0")
    await operator.look()
    world.denies = ApiError
    with pytest.raises(ApiError):
        await disrupted(operator)
    world.remove(PODS)
    for _ in range(13):
        world.pass_seconds(600)
        with pytest.raises(ApiError):
            await operator.look()
    assert operator.true()["Queued"] == "Refused"
    assert operator.job["status"]["goodput"]["state"] == "queue"
    world.denies = None
    await operator.look()
    world.add_pods("demo-a1")
    await operator.look()
    assert "Running" in operator.true()
    assert hours(operator) == {"queue": 2, "startup": 0, "restart": 0}


async def test_a_job_that_ran_out_of_time_names_what_its_ranks_commit_as_they_are_ended() -> None:
    operator = await running(schedule={"activeDeadlineSeconds": 60})
    operator.world.pass_seconds(61)
    operator.world.keeps = True
    await operator.look()
    assert operator.true()["Failed"] == "DeadlineExceeded"
    gang = operator.world.objects[JOBS.plural, "demo-a0"]
    assert "deletionTimestamp" in gang["metadata"]
    await operator.look()
    assert not operator.reconciler.is_over(operator.key), "its ranks still commit"
    committed = {"step": 137, "uri": "s3://m/step-137", "digest": "d" * 64}
    said = words(cause="Stopped", exit_code=75, step=137, checkpoint=committed).as_bytes().decode()
    for name in operator.world.names(PODS):
        operator.world.objects[PODS.plural, name]["status"] |= {"phase": "Failed", "containerStatuses": ended(75, said)}
    await operator.look()
    assert operator.job["status"]["checkpoint"]["step"] == 137
    assert operator.true()["Failed"] == "DeadlineExceeded"
    operator.world.remove(PODS)
    operator.world.remove(JOBS)
    await operator.look()
    assert operator.reconciler.is_over(operator.key)
