"""One round: attempts at one run through proxies that misbehave by plan, and then every promise is checked.

A plan is drawn from its seed alone. Which of an attempt's parallel uploads is the third request is the threads' choice,
so a seed repeats the plan, and nearly always the round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

from nexa_train.artifact.manifest import Manifest
from nexa_train.artifact.publish import newest_valid, run_steps
from nexa_train.artifact.verify import verify
from nexa_train.store import open_store
from tests.cluster.fault_proxy import Fault, FaultProxy
from tests.cluster.minio import MinioServer
from tests.cluster.run import wait_until
from tests.contract.publishing.attempt import Nursery, Task
from tests.contract.publishing.history import History

RUN_ID = "team-survives-0123456789"
STEPS = (10, 20, 30)
KILLS = ("kill before", "kill during", "kill after")
# The rest is what a store or a network does by itself.
WEATHER = [fault for fault in get_args(Fault) if fault not in (*KILLS, "hold", "403", "unconditional")]
REQUESTS = 60
"""About as many as an attempt makes that trains all steps and is left in peace."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Attempts that run at the same time, each with its faults.

    Attributes:
        damage: whether the newest checkpoint is damaged before they begin.
        one_by_one: each begins when the one before is held, or over.
    """

    attempts: tuple[dict[int, Fault], ...]
    damage: bool = False
    one_by_one: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A round."""

    phases: tuple[Phase, ...]
    keep_last: int | None = None
    versioning: bool = True
    in_order: bool = True
    count_writes: bool = False


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    versioning = rng.random() < 0.5
    return Plan(
        phases=tuple(
            _draw_phase(rng, damage=number > 0 and not versioning) for number in range(rng.choice((1, 1, 2, 3)))
        ),
        keep_last=rng.choice((None, 1, 1, 2)),
        versioning=versioning,
        in_order=rng.random() < 0.8,
    )


def _draw_phase(rng: random.Random, *, damage: bool) -> Phase:
    attempts = [_draw_faults(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    return Phase(attempts=tuple(attempts), damage=damage and rng.random() < 0.5)


def _draw_faults(rng: random.Random) -> dict[int, Fault]:
    faults: dict[int, Fault] = {}
    for _ in range(rng.choice((0, 1, 2, 4, 8))):
        faults[rng.randint(1, REQUESTS)] = rng.choice(WEATHER)
    if rng.random() < 0.3:  # a store that is ill for a while
        begin, fault = rng.randint(1, REQUESTS), rng.choice(WEATHER)
        faults |= dict.fromkeys(range(begin, begin + rng.randint(2, 5)), fault)
    if rng.random() < 0.4:
        faults[rng.randint(1, REQUESTS)] = "hold"
    if rng.random() < 0.4:
        faults[rng.randint(1, REQUESTS)] = rng.choice(KILLS)
    return faults


@dataclass
class Round:
    """A plan that is carried out at a real MinIO, and what was wrong with it."""

    plan: Plan
    minio: MinioServer
    nursery: Nursery
    bucket: str
    prefix: str
    scratch: Path
    history: History = field(init=False)
    told: list[tuple[int, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.plan
        self.history = History(f"/{self.bucket}/{self.prefix}/", plan.keep_last, in_order=plan.in_order)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def carry_out(self) -> list[str]:
        """All phases, then one attempt that nothing disturbs; returns what was wrong, one line each."""
        for number, phase in enumerate(self.plan.phases):
            if phase.damage:
                self._damage()
            self._run(number, phase)
        last = len(self.plan.phases)
        before = len(self.log)
        self._run(last, Phase(attempts=({},)))
        if not any("ended ''" in line for line in self.log[before:]):
            self.wrong.append("an attempt that nothing disturbs did not end well")
            return self.wrong + self.history.wrong
        self._check()
        return self.wrong + self.history.wrong

    def _run(self, number: int, phase: Phase) -> None:
        with self._proxies(phase) as proxies:
            running = []
            for index, proxy in enumerate(proxies):
                attempt = self.nursery.start(self._task(f"a{number}{index}", proxy))
                proxy.kills(attempt.pid)
                running.append(attempt)
            for attempt, proxy in zip(running, proxies, strict=True):
                attempt.go()
                if phase.one_by_one:
                    wait_until(lambda: proxy.holds.is_set() or not attempt.alive, timeout_seconds=60, what="it is held")  # noqa: B023
            # What is held goes when all others are through: those without a hold are waited for first.
            order = sorted(range(len(running)), key=lambda index: "hold" in phase.attempts[index].values())
            for index in order:
                proxies[index].release()
                self._hear(f"a{number}{index}", running[index].reports())

    @contextmanager
    def _proxies(self, phase: Phase) -> Iterator[Sequence[FaultProxy]]:
        proxies = [
            FaultProxy(
                upstream=(self.minio.address, self.minio.port),
                faults=faults,
                count_writes=self.plan.count_writes,
                around=self.history.around,
            )
            for faults in phase.attempts
        ]
        try:
            yield proxies
        finally:
            for proxy in proxies:
                proxy.close()
            self.log += [line for proxy in proxies for line in ("--", *proxy.seen)]

    def _task(self, name: str, proxy: FaultProxy) -> Task:
        env = self.minio.env() | {"AWS_ENDPOINT_URL": proxy.endpoint}
        return Task(
            uri=self.uri,
            run_id=RUN_ID,
            name=name,
            steps=STEPS,
            keep_last=self.plan.keep_last,
            scratch=str(self.scratch),
            env=env,
        )

    def _hear(self, name: str, reports: Sequence[dict[str, Any]]) -> None:
        for report in reports:
            if "digest" in report:
                self.told.append((report["step"], report["digest"]))
            if "ended" in report:
                self.log.append(f"{name} ended {report['ended']!r}: {report.get('message')}")
                if report["ended"] not in ("", "SupersededError", "RefusedError"):
                    self.wrong.append(f"{name} ended with {report['ended']}: {report['message']}")

    def _damage(self) -> None:
        """Other bytes for a file of the newest checkpoint, as a disk or a person would do it."""
        newest = newest_valid(open_store(self.uri), RUN_ID).committed
        if newest is None:
            return
        entry = newest.manifest.files[0]
        key, content = f"{newest.folder}/{entry.object}", b"x" * entry.size
        self.minio.client.put_object(self.bucket, f"{self.prefix}/{key}", BytesIO(content), len(content))
        self.history.damage(key, content, of=newest.digest)
        self.log.append(f"-- step {newest.manifest.step} was damaged")

    def _check(self) -> None:
        """At the store itself, past every proxy."""
        store = open_store(self.uri)
        report = verify(self.uri)
        self.wrong += report.problems
        steps = {one.step: one.digest for one in report.manifests}
        keep = self.plan.keep_last or len(STEPS)
        if list(steps) != list(STEPS[-keep:]):
            self.wrong.append(f"steps {list(steps)} are there, expected the last {keep} of {STEPS}")
        for step, digest in self.told:
            if step in steps and steps[step] != digest and not self.history.damaged:
                self.wrong.append(f"step {step} was reported as {digest}, and is {steps[step]}")
        self._check_litter(store)
        if self.plan.in_order:
            self._check_history(store)

    def _check_litter(self, store: Any) -> None:
        """A step that is not committed keeps one empty name; one that is, what its manifest names, and evidence."""
        for step in run_steps(store, RUN_ID):
            named: set[str] = set()
            if step.committed:
                manifest = Manifest.from_bytes(store.open(step.key).read())
                named = {f"{step.folder}/{entry.object}" for entry in manifest.files}
            litter = [key for key in step.others if key not in named and "/damaged-" not in key]
            # The name of a step that was given up or came too late goes with the step.
            litter = [key for key in litter if not (step.committed and "/manifest" in key)]
            self.wrong += [f"{key} is left, and nothing needs it" for key in litter]

    def _check_history(self, store: Any) -> None:
        found = {stored.key: store.open(stored.key).read() for stored in store.list()}
        noted = {key: content for key, content in self.history.objects.items() if not key.startswith(".nexa/")}
        if found != noted:
            differs = {key for key in found.keys() | noted.keys() if found.get(key) != noted.get(key)}
            self.wrong.append(f"the store holds other bytes than were written: {sorted(differs)}")
        for step, digest in self.told:
            if digest not in self.history.visible.get(step, []):
                self.wrong.append(f"step {step} was reported as committed with {digest}, which was never visible")
        for step, digests in self.history.visible.items():
            if len(digests) > 1 and not self.history.damaged:  # after damage, a run may have begun anew
                self.wrong.append(f"step {step} was committed by more than one: {digests}")
