"""Jobs that train in real pods, and what kills parts of them: a schedule of strikes and what each of them cost."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from pydantic import ValidationError

from nexa_train.config.protocol import PROGRESS_PORT, Progress
from tests.cluster.api import Api
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster
from tests.cluster.product import EXAMPLE, condition, manifests
from tests.cluster.run import wait_until
from tests.integration.harness import Operator

SAVE_EVERY = 10
JOBS = "/apis/train.nexa.dev/v1alpha1/namespaces/default/nexatrainingjobs"
PODS = "/api/v1/namespaces/default/pods"
POLL_SECONDS = 0.05
MOST_STEPS_BETWEEN = 25
MOVED_ON_SECONDS = 240
"""By then there must be a next step, whatever was killed; the target is another matter."""


@dataclass(frozen=True)
class Strike:
    """One kill and what it cost; steps are lost where it ended the attempt."""

    kind: str
    seconds: float
    """From the kill to the next step that was trained."""
    waited_seconds: float
    """How long of these what trained it waited for a processor: what other work on this machine took from it."""
    step: int
    lost_steps: int
    ended_attempt: bool


@dataclass
class Field:
    """What a job trains on."""

    cluster: RealCluster
    minio: MinioServer
    operator: Operator
    api: Api
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=2, trust_env=False))

    def job(self, document: dict[str, Any]) -> Run:
        """A job, applied."""
        self.cluster.kubectl("apply", "--filename=-", input=json.dumps(document))
        return Run(self, document["metadata"]["name"])


@dataclass
class Run:
    """A job that runs, watched from outside."""

    field: Field
    name: str
    restored: dict[int, int] = field(default_factory=dict)
    """The step that each attempt went on from."""
    reached: dict[int, int] = field(default_factory=dict)
    """The last step that was seen of each attempt."""
    latest: Progress | None = None
    _address: str = ""
    _looked: float = 0.0

    @property
    def status(self) -> dict[str, Any]:
        found = self.field.api.get(f"{JOBS}/{self.name}") or {}
        status: dict[str, Any] = found.get("status", {})
        return status

    def pods(self) -> list[dict[str, Any]]:
        """Of the newest attempt, by index; those that end are left out."""
        found = self.field.api.list(PODS, labels=f"train.nexa.dev/job-name={self.name}")
        living = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
        newest = max((_attempt(pod) for pod in living), default=0)
        return sorted((pod for pod in living if _attempt(pod) == newest), key=lambda pod: pod["metadata"]["name"])

    def look(self) -> Progress | None:
        """What pod 0 of the newest attempt says now."""
        progress = self._ask() or self._ask_anew()
        if progress is not None and progress.checkpoint is not None:
            self.restored.setdefault(progress.attempt, progress.checkpoint.step)
        if progress is not None:
            self.reached[progress.attempt] = max(progress.step, self.reached.get(progress.attempt, 0))
        self.latest = progress or self.latest
        return progress

    def wait_step(
        self, *, beyond: Progress | None, attempt: int, timeout_seconds: float = MOVED_ON_SECONDS
    ) -> Progress:
        """Until an attempt from `attempt` on has trained a step, in the attempt of `beyond` one after that."""

        def moved() -> Progress | None:
            seen = self.look()
            if seen is None or seen.attempt < attempt:
                return None
            same = beyond is not None and seen.attempt == beyond.attempt
            known = beyond.step if beyond is not None and same else self.restored.get(seen.attempt, 0)
            return seen if seen.step > known else None

        return wait_until(
            moved, timeout_seconds=timeout_seconds, what="a step", interval_seconds=POLL_SECONDS, detail=self.describe
        )

    def wait_beyond(self, steps: int) -> None:
        """Until so many more steps have been trained."""
        began = self.wait_step(beyond=self.latest, attempt=self.latest.attempt if self.latest else 0)
        target = began.step + steps
        wait_until(
            lambda: (seen := self.look()) is not None and seen.step >= target,
            timeout_seconds=MOVED_ON_SECONDS,
            what=f"step {target}",
            interval_seconds=POLL_SECONDS,
            detail=self.describe,
        )

    def wait_succeeded(self, timeout_seconds: float = 600) -> dict[str, Any]:
        """Its last status."""

        def over() -> dict[str, Any] | None:
            status = self.status
            ended = [condition(status, kind).get("status") == "True" for kind in ("Succeeded", "Failed")]
            return status if any(ended) else None

        status = wait_until(over, timeout_seconds=timeout_seconds, what="the end", detail=self.describe)
        assert condition(status, "Succeeded").get("status") == "True", self.describe()
        return status

    def manifests(self) -> list[dict[str, Any]]:
        """Committed ones, oldest first."""
        return manifests(self.field.minio, self.status["runId"])

    def describe(self) -> str:
        """For messages."""
        pods = self.field.cluster.kubectl("describe", "pods", check=False).stdout
        return json.dumps(self.status, indent=1) + str(self.latest) + pods[-5000:]

    def _ask(self) -> Progress | None:
        if not self._address:
            return None
        try:
            answer = self.field.http.get(f"http://{self._address}:{PROGRESS_PORT}/progress")
            return Progress.model_validate_json(answer.content)
        except (httpx.HTTPError, ValidationError):
            self._address = ""
            return None

    def _ask_anew(self) -> Progress | None:
        if time.monotonic() - self._looked < 0.3:
            return None
        self._looked, pods = time.monotonic(), self.pods()
        self._address = pods[0].get("status", {}).get("podIP", "") if pods else ""
        return self._ask()


def _attempt(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["labels"]["train.nexa.dev/attempt"])


def processes_of(pod: dict[str, Any]) -> list[psutil.Process]:
    """All processes of a pod, as this machine sees them."""
    uid, found = pod["metadata"]["uid"], []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if uid in Path(f"/proc/{process.pid}/cgroup").read_text():
                found.append(process)
    return found


def processes_running(pod: dict[str, Any], module: str) -> list[psutil.Process]:
    """Those of a pod that run a module of ours: the first that they name, for torchrun names the rank's too."""
    found = []
    for process in processes_of(pod):
        with suppress(psutil.Error):
            words = process.cmdline()
            if "-m" in words[:-1] and words[words.index("-m") + 1] == module:
                found.append(process)
    return found


def process_of(pod: dict[str, Any], module: str) -> psutil.Process | None:
    """The first of them, if there is any."""
    return next(iter(processes_running(pod, module)), None)


def wait_for_process(run: Run, chance: random.Random, module: str) -> psutil.Process:
    """One of any pod of the newest attempt."""
    index = chance.randrange(2)

    def there() -> psutil.Process | None:
        pods = run.pods()
        return process_of(pods[index], module) if len(pods) == 2 else None

    return wait_until(there, timeout_seconds=120, what=module, detail=run.describe)


CHAIN = ("nexa_train.entrypoint", "nexa_train.launch.torchrun", "nexa_train.rank")
"""What starts what in a pod: each sleeps while the next comes up, so that their waits for a processor add up."""


def waited_seconds(pods: Iterable[dict[str, Any]]) -> float:
    """How long the first threads of a gang's processes have waited for a processor so far, in the pod that did most.

    Of what made the pod ready nothing is known (its kubelet, containerd, the operator), so this is rather too little.
    """
    return max((sum(_run_delay(pod, module) for module in CHAIN) for pod in pods), default=0.0)


def _run_delay(pod: dict[str, Any], module: str) -> float:
    """Of the process of that pod which runs a module; of several the one that waited least."""
    delays: list[float] = []
    for process in processes_running(pod, module):
        with suppress(OSError):
            delays.append(int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9)
    return min(delays, default=0.0)


Kill = Callable[[], None]


def find_rank(run: Run, chance: random.Random) -> Kill:
    return wait_for_process(run, chance, "nexa_train.rank").kill


def find_main(run: Run, chance: random.Random) -> Kill:
    return wait_for_process(run, chance, "nexa_train.entrypoint").kill


def find_shim(run: Run, chance: random.Random) -> Kill:
    shim = wait_for_process(run, chance, "nexa_train.entrypoint").parent()
    assert shim is not None
    assert "containerd-shim" in shim.name(), shim
    return shim.kill


def find_pod(run: Run, chance: random.Random) -> Kill:
    path = f"{PODS}/{chance.choice(run.pods())['metadata']['name']}"
    return lambda: run.field.api.call("DELETE", path, {"gracePeriodSeconds": 0}) and None


def find_operator(run: Run, chance: random.Random) -> Kill:
    def kill() -> None:
        run.field.operator.kill()
        run.field.operator.start()

    return kill


def find_minio(run: Run, chance: random.Random) -> Kill:
    away_seconds = chance.uniform(0, 3)

    def kill() -> None:
        run.field.minio.kill()
        time.sleep(away_seconds)
        run.field.minio.start()

    return kill


ENDS_ATTEMPT = {"rank": find_rank, "main": find_main, "shim": find_shim, "pod": find_pod}
ENDS_NOTHING = {"operator": find_operator, "minio": find_minio}
STRIKES: dict[str, Callable[[Run, random.Random], Kill]] = {**ENDS_ATTEMPT, **ENDS_NOTHING}


def strike(run: Run, kind: str, chance: random.Random) -> Strike:
    """Kill something and wait for the next step."""
    kill = STRIKES[kind](run, chance)
    before = run.look() or run.latest
    assert before is not None
    began = time.monotonic()
    kill()
    after = run.wait_step(beyond=before, attempt=before.attempt + (kind in ENDS_ATTEMPT))
    seconds, ended = time.monotonic() - began, after.attempt > before.attempt
    lost = run.reached[before.attempt] - run.restored.get(after.attempt, 0) if ended else 0
    # All processes of a new attempt began after the kill; those of an old one had waited before.
    waited = waited_seconds(run.pods()) if ended else 0.0
    return Strike(kind, seconds, waited, before.step, lost, ended)


def deck(rounds: int, chance: random.Random) -> list[str]:
    """Every kind so many times, in a random order."""
    kinds = [*STRIKES] * rounds
    chance.shuffle(kinds)
    return kinds


def under_fire(run: Run, kinds: Iterable[str], chance: random.Random) -> list[Strike]:
    """One strike after the other, each at a random moment of the steps that follow the last."""
    struck: list[Strike] = []
    for kind in kinds:
        run.wait_beyond(chance.randrange(MOST_STEPS_BETWEEN))
        time.sleep(chance.uniform(0, 0.2))
        struck.append(strike(run, kind, chance))
        print(f"{run.name}: {struck[-1]}", flush=True)
    return struck


def document(name: str, *, steps: int, **recovery: Any) -> dict[str, Any]:
    """examples/job.yaml with more steps of less work, and room on the node for a gang that ends while one starts."""
    made: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    made["metadata"]["name"], spec = name, made["spec"]
    spec["model"] |= {"dModel": 64, "nLayers": 2, "nHeads": 2}
    spec["data"]["validation"] = {"rows": 8}
    spec["training"] |= {"globalBatchSize": 8, "maxSteps": steps, "saveEverySteps": SAVE_EVERY}
    spec["cluster"]["resources"] = {"memory": "3Gi"}
    spec["recovery"] = {"maxRestarts": 100, "backoffSeconds": 0, "progressDeadlineSeconds": 120, **recovery}
    return made


def undisturbed(ground: Field, steps: int, folder: Path) -> str:
    """The weights digest of the same file run on this machine, with nothing in its way."""
    job = folder / "job.json"
    job.write_text(json.dumps(document("undisturbed", steps=steps)))
    command = [sys.executable, "-m", "nexa_train", "run", str(job), "--set", f"artifacts.uri={folder}", "-o", "json"]
    done = subprocess.run(
        command, env={**os.environ, **ground.minio.env()}, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    digest: str = json.loads(done.stdout)["checkpoint"]["weights_digest"]
    return digest


def commit_lag_steps(manifests: list[dict[str, Any]]) -> int:
    """The most steps that were trained from a checkpoint's own step until it was committed."""
    lags = [0]
    for earlier, later in pairwise(manifests):
        lags += [entry["step"] - earlier["step"] for entry in later["logs"] if "save_background_seconds" in entry]
    return max(lags)


def percentile(seconds: list[float], share: float) -> float:
    """The smallest that is not exceeded by this share of them."""
    return sorted(seconds)[math.ceil(share * len(seconds)) - 1]
