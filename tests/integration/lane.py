"""A namespace, a proxy and an operator of their own, in which one job lives after the other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexa_operator.kinds import EVENTS, JOBS, JOBSETS, PODS, SERVICES, TRAINING_JOBS
from tests.cluster.api import Api
from tests.cluster.api_proxy import ApiProxy, Story
from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until
from tests.integration.harness import Operator, kubeconfig_through, manifest, new_namespace, pod_status, words

STEP_SECONDS = 90
"""Longer than the operator waits for one answer, and for the next resync."""
KEEPER = "lane"
"""Of the nodes that lanes have of their own."""
_KINDS = {kind.plural: kind for kind in (TRAINING_JOBS, JOBS, JOBSETS, PODS, SERVICES, EVENTS)}


class Lane:
    """What a test does there, and how long the operator took to be back."""

    def __init__(
        self, namespace: str, api: Api, proxy: ApiProxy, operator: Operator, nodes: Sequence[str] = ()
    ) -> None:
        self.namespace, self.api, self.proxy, self.operator = namespace, api, proxy, operator
        self.nodes = nodes
        """Of its own, without a kubelet: pods stay there as they are, also when they shall go."""
        self.settled: list[tuple[float, float]] = []
        """Seconds from each restart until what the test waited for was so; for how many it waited for a processor."""
        self._restarted = 0.0
        self._restarting = threading.Lock()
        proxy.kill = self.kill

    def begin(self, story: Story) -> None:
        """From now on this one counts."""
        self._restarted = 0.0
        self.proxy.begin(story)

    def kill(self) -> None:
        """SIGKILL, and start anew."""
        with self._restarting:
            self.operator.kill()
            self._restarted = time.monotonic()
            self.operator.start()

    @property
    def alive(self) -> bool:
        with self._restarting:
            return self.operator.process.poll() is None

    def path(self, kind: str, name: str = "") -> str:
        return _KINDS[kind].path(self.namespace, name)

    def submit(self, name: str, **spec: Any) -> None:
        self.api.create(self.path("nexatrainingjobs"), manifest(name, **spec))

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = (self.api.get(self.path("nexatrainingjobs", name)) or {}).get("status", {})
        return status

    def wait(self, seen: Callable[[], Any], what: str, *, timeout_seconds: float = STEP_SECONDS) -> Any:
        """After a kill the operator counts as settled once this is so."""
        story = self.proxy.story
        restarted = 0.0

        def seen_since() -> Any:
            nonlocal restarted
            restarted = self._restarted  # what is looked at next is the work of this operator or of one before it
            return seen()

        detail = lambda: "\n".join([*story.log, json.dumps(self.status(story.job), indent=1)])  # noqa: E731
        found = wait_until(seen_since, timeout_seconds=timeout_seconds, what=f"{story.job}: {what}", detail=detail)
        with self._restarting:  # a kill may come from the proxy at any moment: that one is of the next wait
            if restarted and restarted == self._restarted:
                self.settled.append((time.monotonic() - restarted, self._seconds_without_processor()))
                self._restarted = 0.0
        return found

    def _seconds_without_processor(self) -> float:
        """Of the operator, since it was started: what other work on this machine took from it."""
        return int(Path(f"/proc/{self.operator.process.pid}/schedstat").read_text().split()[1]) / 1e9

    def wait_true(
        self, name: str, kind: str, *, attempt: int = 0, timeout_seconds: float = STEP_SECONDS
    ) -> dict[str, Any]:
        """The status that says so."""

        def so() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status.get("attempt") == attempt and conditions(status).get(kind) == "True" else None

        what = f"{name}: attempt {attempt} is {kind}"
        found: dict[str, Any] = self.wait(so, what, timeout_seconds=timeout_seconds)
        return found

    def pods(self, gang: str) -> list[dict[str, Any]]:
        """Those of its ranks."""
        job, _, attempt = gang.rpartition("-a")
        labels = f"train.nexa.dev/job-name={job},train.nexa.dev/attempt={attempt},!train.nexa.dev/role"
        return self.api.list(self.path("pods"), labels=labels)

    def pods_beside(self, name: str, role: str) -> list[dict[str, Any]]:
        """Those that are no rank: they ask for room, or remove artifacts."""
        labels = f"train.nexa.dev/job-name={name},train.nexa.dev/role={role}"
        return self.api.list(self.path("pods"), labels=labels)

    def play(self, gang: str, phase: str, *, ranks: Sequence[int] = (0, 1), num_pods: int = 2, **said: Any) -> None:
        """Once all its pods are there, some of them say so, as a kubelet would."""
        pods = self.wait(
            lambda: found if len(found := self.pods(gang)) == num_pods else None, f"{num_pods} pods of {gang}"
        )
        for pod in pods:
            if rank_of(pod) in ranks:
                self.say(pod, phase, **said)

    def say(self, pod: dict[str, Any], phase: str, **said: Any) -> None:
        """As its kubelet would."""
        status = pod_status(phase, words=words(**said) if said else None)
        self.api.merge(self.path("pods", pod["metadata"]["name"]) + "/status", {"status": status})

    @property
    def place(self) -> dict[str, Any]:
        """What `spec.cluster` says for pods to go to this lane's nodes."""
        tolerated = {"key": "kwok.x-k8s.io/node", "operator": "Equal", "value": KEEPER, "effect": "NoSchedule"}
        return {"nodeSelector": {"lane": self.namespace}, "tolerations": [tolerated]}

    def cordon(self, node: str, so: bool = True) -> None:
        self.api.merge(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": so}})

    def wait_placed(self, gang: str, num_pods: int = 2) -> list[dict[str, Any]]:
        """Its pods, once each has a node."""

        def placed() -> list[dict[str, Any]] | None:
            pods = [pod for pod in self.pods(gang) if pod["spec"].get("nodeName")]
            return pods if len(pods) == num_pods else None

        found: list[dict[str, Any]] = self.wait(placed, f"{num_pods} pods of {gang} on nodes")
        return found

    def wait_asked_to_go(self, *gangs: str) -> None:
        """Until all their pods shall end."""

        def asked() -> bool:
            return all("deletionTimestamp" in pod["metadata"] for gang in gangs for pod in self.pods(gang))

        self.wait(asked, f"pods of {', '.join(gangs)} are to go")

    def end_pods(self, gang: str) -> None:
        """As their kubelet does with pods that shall go, once all of them shall."""
        self.wait_asked_to_go(gang)
        for pod in self.pods(gang):
            self.api.delete(self.path("pods", pod["metadata"]["name"]), at_once=True)

    def wait_gone(self, name: str) -> None:
        self.wait(lambda: self.api.get(self.path("nexatrainingjobs", name)) is None, f"{name} is gone")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those about a job."""
        return [each for each in self.api.list(self.path("events")) if each["involvedObject"]["name"] == name]

    def change(self, name: str, **spec: Any) -> None:
        self.api.merge(self.path("nexatrainingjobs", name), {"spec": spec})


def rank_of(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def conditions(status: dict[str, Any]) -> dict[str, str]:
    """Type -> status."""
    return {condition["type"]: condition["status"] for condition in status.get("conditions", [])}


@contextmanager
def new_lane(
    cluster: Cluster, kubeconfig: Path, folder: Path, *, nodes: Sequence[str] = (), **environment: str
) -> Iterator[Lane]:
    """With an operator that looks at this lane's namespace alone; on `nodes` there is place for its jobs."""
    folder.mkdir()
    with new_namespace(cluster) as ns:
        if nodes:
            cluster.kubectl("label", "--overwrite", "nodes", *nodes, f"lane={ns.namespace}")
        api, proxy = Api(cluster), ApiProxy(cluster=cluster)
        through = kubeconfig_through(proxy.endpoint, kubeconfig, folder / "kubeconfig")
        operator = Operator(through, folder / "log.jsonl", NEXA_WATCH_NAMESPACE=ns.namespace, **environment)
        try:
            yield Lane(ns.namespace, api, proxy, operator, nodes)
        finally:
            operator.kill()
            proxy.close()
            api.close()
