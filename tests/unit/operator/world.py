"""An API server in memory, as far as looks ask one, and an operator before it whose clock a test turns."""

from __future__ import annotations

import copy
import datetime
import itertools
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

from nexa_operator.errors import ApiError, ConflictError, InvalidError
from nexa_operator.kinds import EVENTS, JOBS, PODS, TRAINING_JOBS, Kind
from nexa_operator.metrics import Metrics
from nexa_operator.naming import LABEL_JOB_UID
from nexa_operator.plan import Defaults
from nexa_operator.progress import ProgressReader
from nexa_operator.reconcile import Key, Reconciler, key_of
from nexa_operator.status import timestamp
from nexa_operator.workqueue import WorkQueue
from tests.unit.operator.builders import NOW, body

Object = dict[str, Any]


class World:
    """Objects by kind and name, all in one namespace; `asked` is every request, in order."""

    def __init__(self) -> None:
        self.now = NOW
        self.objects: dict[tuple[str, str], Object] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.not_older: list[str] = []
        """Of every read, in order."""
        self.unserved: set[Kind] = set()
        self.refused: set[Kind] = set()
        self.warnings: list[Object] = []
        self.overtaken = False
        """Whether somebody changes a job whenever it was read."""
        self.keeps = False
        """Whether what is to go after its children waits for them; a test removes them."""
        self._numbers = itertools.count(1)

    def pass_seconds(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)

    def num_asked(self, verb: str, kind: Kind) -> int:
        return sum(asked[:2] == (verb, kind.plural) for asked in self.asked)

    def put(self, kind: Kind, document: Object) -> Object:
        """As somebody else makes it."""
        there = copy.deepcopy(document)
        number = str(next(self._numbers))
        there["metadata"] = {
            "uid": f"uid-{number}", "generation": 1, "creationTimestamp": timestamp(self.now), "namespace": "team",
            **there["metadata"], "resourceVersion": number,
        }  # fmt: skip
        self.objects[kind.plural, there["metadata"]["name"]] = there
        return there

    def get(self, kind: Kind, name: str) -> Object | None:
        return self.objects.get((kind.plural, name))

    def names(self, kind: Kind) -> list[str]:
        return sorted(name for plural, name in self.objects if plural == kind.plural)

    def add_pods(self, gang: str, *, count: int = 2, phase: str = "Running", **status: Any) -> None:
        """As the gang's controller makes them."""
        owner = self.objects[JOBS.plural, gang]["metadata"]
        for index in range(count):
            labels = {**owner["labels"], "batch.kubernetes.io/job-completion-index": str(index)}
            metadata = {"name": f"{gang}-{index}-x", "labels": labels,
                        "ownerReferences": [{"kind": "Job", "uid": owner["uid"], "controller": True}]}  # fmt: skip
            self.put(PODS, {"metadata": metadata, "status": {"phase": phase, **status}})

    def remove(self, kind: Kind, *names: str) -> None:
        for name in names or self.names(kind):
            del self.objects[kind.plural, name]

    # What the operator asks.

    async def read(self, kind: Kind, namespace: str, name: str, *, not_older: str = "") -> Object | None:
        self._note("get", kind, name)
        self.not_older.append(not_older)
        found = copy.deepcopy(self.get(kind, name))
        if self.overtaken:
            self.objects[kind.plural, name]["metadata"]["resourceVersion"] = str(next(self._numbers))
        return found

    async def list(self, kind: Kind, namespace: str, labels: str = "", *, fields: str = "") -> list[Object]:
        self._note("list", kind, labels or fields)
        if kind == EVENTS:
            return self.warnings
        uids = re.findall(r"[\w-]+", labels.partition(" in ")[2])
        found = [each for (plural, _), each in self.objects.items() if plural == kind.plural]
        return copy.deepcopy([each for each in found if each["metadata"].get("labels", {}).get(LABEL_JOB_UID) in uids])

    async def walk(self, kind: Kind, namespace: str) -> AsyncIterator[Object]:
        self._note("list", kind, "")
        for name in self.names(kind):
            yield copy.deepcopy(self.objects[kind.plural, name])

    async def create(self, kind: Kind, body: Object) -> bool:
        name = body["metadata"]["name"]
        self._note("create", kind, name)
        if self.get(kind, name):
            return False
        self.put(kind, body)
        return True

    async def patch(self, kind: Kind, body: Object, *, subresource: str = "") -> Object:
        name = body["metadata"]["name"]
        self._note("patch", kind, name)
        there = self.get(kind, name)
        if there is None:
            raise ApiError("patch", status=404, message="not found")
        self._check_same(body["metadata"], there["metadata"])
        there["metadata"]["resourceVersion"] = str(next(self._numbers))
        if subresource:
            there["status"] = copy.deepcopy(body["status"])
            return copy.deepcopy(there)
        merged = {key: value for key, value in body["metadata"].items() if key not in ("uid", "resourceVersion")}
        there["metadata"] |= merged
        if "spec" in body:
            there["spec"] |= body["spec"]
            there["metadata"]["generation"] += 1
        return copy.deepcopy(there)

    @staticmethod
    def _check_same(asked: Object, there: Object) -> None:
        if asked.get("resourceVersion", there["resourceVersion"]) != there["resourceVersion"]:
            raise ConflictError("patch", status=409, message="the object has been modified")
        if asked.get("uid", there["uid"]) != there["uid"]:
            raise InvalidError("patch", status=422, message="metadata.uid: field is immutable")

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str = "", children_first: bool = False
    ) -> None:
        self._note("delete", kind, name)
        there = self.get(kind, name)
        if there is None or uid not in ("", there["metadata"]["uid"]):
            return
        if children_first and self.keeps:
            there["metadata"]["deletionTimestamp"] = timestamp(self.now)
        else:
            self.remove(kind, name)

    def _note(self, verb: str, kind: Kind, what: str) -> None:
        self.asked.append((verb, kind.plural, what))
        if kind in self.unserved:
            raise ApiError(verb, status=404, message="the server could not find the requested resource")
        if kind in self.refused:
            raise ApiError(verb, status=403, message="forbidden")


class Appointments(WorkQueue[Key]):
    """Keeps when it is to look again."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[float] = []
        self.cancelled: list[Key] = []

    def add_after(self, key: Key, seconds: float) -> None:
        self.later.append(seconds)

    def cancel(self, key: Key) -> None:
        self.cancelled.append(key)


class Operator:
    """One operator in a world with one job, `demo`."""

    def __init__(self, world: World, *, reads_nodes: bool = True, **groups: Any) -> None:
        self.world, self.queue, self.metrics = world, Appointments(), Metrics()
        if world.get(TRAINING_JOBS, "demo") is None:
            world.put(TRAINING_JOBS, body(**groups))
        progress = ProgressReader(on_news=self.queue.add, transport=httpx.AsyncHTTPTransport(verify=False))
        self.reconciler = Reconciler(
            cluster=world, queue=self.queue, progress=progress, metrics=self.metrics,
            defaults=Defaults(image="trainer:1"), clock=lambda: world.now, reads_nodes=reads_nodes,
        )  # fmt: skip

    @property
    def job(self) -> Object:
        there = self.world.get(TRAINING_JOBS, "demo")
        assert there is not None
        return there

    @property
    def key(self) -> Key:
        return key_of(self.job)

    def true(self) -> dict[str, str]:
        return {each["type"]: each["reason"] for each in self.job["status"]["conditions"] if each["status"] == "True"}

    async def look(self) -> list[float]:
        """One look; when it wants to look again."""
        self.queue.later.clear()
        await self.reconciler.reconcile(self.key)
        return list(self.queue.later)
