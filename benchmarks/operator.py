"""The operator beside plain Jobs and the training-operator: jobs of two pods on fake nodes before a real control plane.

    python -m benchmarks.operator                   some 30 minutes on two cores
    python -m benchmarks.operator --quick           one short round, in 4
    python -m benchmarks.operator --only throughput

What is compared, and how to read it, is in docs/benchmarks.md. The programs of the control plane are built once; the
training-operator takes part if its binary was built too (`python -m tests.cluster.tools training-operator`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine
from benchmarks.controllers import OPERATOR_USER, by_hand, nexa, plain, training_operators
from benchmarks.fleet import NAMESPACE, Load, Object, Turn, take_turn
from benchmarks.report import Part, Target
from tests.cluster import host
from tests.cluster.errors import ClusterError

STEADY_RATE = 5.0
MIB = 2**20


def throughput_part(*, quick: bool) -> Part:
    """As many jobs at once, everyone in turn."""
    num_jobs, rounds = (200, 1) if quick else (1_000, 3)
    few = 60 if quick else 300
    sides = {plain(): num_jobs, by_hand(): num_jobs, nexa(): num_jobs}
    peers, missing = training_operators()
    turns: dict[str, list[Turn]] = {side.name: [] for side in (*sides, *peers)}
    for _ in range(rounds):
        for side, count in sides.items():
            turns[side.name].append(take_turn(side, Load(count)))
    for side in list(peers):
        try:
            turns[side.name].append(take_turn(side, Load(few)))
        except SystemExit as reason:  # a peer that does not end its jobs costs its own row and no other
            peers.remove(side)
            del turns[side.name]
            missing.append(f"left out: {reason}")
    rates = {name: statistics.median(turn.rate for turn in taken) for name, taken in turns.items()}
    costs = {name: statistics.median(turn.processor_ms() for turn in taken) for name, taken in turns.items()}
    targets = [
        Target("jobs/s, nexa / plain Jobs", rates["nexa"] / rates["plain Jobs"], 0.9),
        *(Target(f"jobs/s, nexa / {side.name}", rates["nexa"] / rates[side.name], 3.0) for side in peers),
        Target(
            f"MiB resident after {num_jobs} jobs",
            max(turn.resident for turn in turns["nexa"]) / MIB,
            150,
            at_most=True,
        ),
    ]
    ratio = costs["plain Jobs"] / costs["nexa"]
    notes = [f"processor time a job, plain Jobs / nexa: {ratio:.3g}", *missing]
    return Part(
        f"Throughput: {num_jobs} jobs of 2 pods at once",
        ("side", "jobs", "jobs/s", "each", "ms CPU a job", "of them its own", "API server", "MiB", "load before"),
        [_row(name, taken) for name, taken in turns.items()],
        targets,
        notes,
    )


def _row(name: str, taken: list[Turn]) -> tuple[str, int, float, str, float, float, float, float, float]:
    middle = sorted(taken, key=lambda turn: turn.rate)[len(taken) // 2]
    return (
        name,
        len(middle.ended),
        middle.rate,
        ", ".join(f"{turn.rate:.1f}" for turn in taken),
        middle.processor_ms(),
        middle.processor_ms("controller"),
        middle.processor_ms("kube-apiserver"),
        middle.resident / MIB,
        middle.load_average,
    )


def steady_part(*, quick: bool) -> Part:
    """Some jobs a second: how soon the first child is there, and what a job's whole life asks of the API server."""
    turn = take_turn(nexa(), Load(60 if quick else 300, per_second=STEADY_RATE), audit=True)
    waits = sorted(first_child_seconds(turn.audit).values())
    writes, reads = requests_per_job(turn.audit)
    rows = [
        ("first child after creation, median s", statistics.median(waits)),
        ("first child after creation, p99 s", percentile(waits, 99)),
        ("first child after creation, most s", waits[-1]),
        ("jobs", len(waits)),
        ("writes a job, mean", statistics.mean(writes.values())),
        ("writes a job, most", max(writes.values())),
        ("reads a job, mean", reads / len(waits)),
        ("ms of the operator's processor time a job", turn.processor_ms("controller")),
        ("load average before", turn.load_average),
    ]
    return Part(
        f"Steady: {STEADY_RATE:g} jobs a second",
        ("what", "found"),
        rows,
        [
            Target("first child after creation, p99 s", percentile(waits, 99), 1.0, at_most=True),
            Target("writes a job's life, the most of any", max(writes.values()), 8, at_most=True),
        ],
        [f"writes: {_listed(kinds_of_writes(turn.audit), len(waits))}"],
    )


def _listed(kinds: Counter[str], num_jobs: int) -> str:
    return ", ".join(f"{count / num_jobs:.2f} {what}" for what, count in kinds.most_common())


def growth_part(*, quick: bool) -> Part:
    """Many jobs, some hundred unfinished at any time: the finished ones stay and must not slow down the others."""
    # A new job waits for one that ends, so they come and go in waves, and most of a wave ends together. What is
    # measured holds whole waves: a thousand that ended in the midst of one seemed slower by a fifth.
    num_jobs, every, unfinished = (600, 200, 100) if quick else (5_000, 1_000, 250)
    rows, targets = [], []
    for side in (nexa(), plain()):
        turn = take_turn(side, Load(num_jobs, unfinished=unfinished))
        rates = turn.rates(every)
        slowest = min(rates) / rates[0]
        own = turn.processor_ms("controller")
        resident, peak = turn.resident / MIB, turn.peak / MIB
        listed = ", ".join(f"{rate:.1f}" for rate in rates)
        rows.append((side.name, listed, slowest, own, resident, peak, turn.load_average))
        if side.name == "nexa":
            targets = [
                Target(f"slowest {every} jobs / first {every}", slowest, 0.8),
                Target(f"MiB resident after {num_jobs} jobs", resident, 150, at_most=True),
            ]
    return Part(
        f"Growth: {num_jobs} jobs of 2 pods, {unfinished} unfinished at a time",
        ("side", f"jobs/s of each {every}", "slowest / first", "ms CPU its own", "MiB", "peak MiB", "load before"),
        rows,
        targets,
    )


def first_child_seconds(audit: Iterable[Object]) -> dict[str, float]:
    """From the creation of each job to that of the Job of its first attempt, as the API server answered them."""
    jobs, gangs = {}, {}
    for request in audit:
        what = request.get("objectRef", {})
        if request["verb"] != "create" or request["responseStatus"]["code"] != 201:
            continue
        when = datetime.fromisoformat(request["stageTimestamp"])
        if what.get("resource") == "nexatrainingjobs" and "subresource" not in what:
            jobs[what["name"]] = when
        elif what.get("resource") == "jobs" and request["user"]["username"] == OPERATOR_USER:
            gangs[what["name"].removesuffix("-a0")] = when
    return {name: (gangs[name] - created).total_seconds() for name, created in jobs.items()}


def requests_per_job(audit: Iterable[Object]) -> tuple[Counter[str], int]:
    """The operator's writes by job, and all its reads; its Lease is nobody's."""
    writes: Counter[str] = Counter()
    reads = 0
    for request in _of_operator(audit):
        if request["verb"] in ("get", "list"):
            reads += 1
        elif request["verb"] != "watch":
            writes[_job_of(request["objectRef"])] += 1
    return writes, reads


def kinds_of_writes(audit: Iterable[Object]) -> Counter[str]:
    """How often the operator wrote what."""
    return Counter(
        " ".join([request["verb"], *(ref[key] for key in ("resource", "subresource") if key in ref)])
        for request in _of_operator(audit)
        if request["verb"] not in ("get", "list", "watch")
        for ref in [request["objectRef"]]
    )


def _of_operator(audit: Iterable[Object]) -> Iterable[Object]:
    return (
        request
        for request in audit
        if request["user"]["username"] == OPERATOR_USER and request.get("objectRef", {}).get("namespace") == NAMESPACE
    )


def _job_of(ref: Object) -> str:
    """Children and events are called after their job: NAME, NAME-a0, NAME.DIGEST."""
    return "-".join(str(ref["name"]).partition(".")[0].split("-")[:2])


def percentile(ordered: list[float], percent: int) -> float:
    """The value that so many in a hundred do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


PARTS: dict[str, Callable[..., Part]] = {
    "throughput": throughput_part,
    "steady": steady_part,
    "growth": growth_part,
}
QUICK = ("throughput", "steady")


def main() -> int:
    """Run the parts that were asked for; print tables, and write JSON where asked."""
    options = _options()
    try:
        host.require_control_plane()
    except ClusterError as reason:
        print(f"benchmarks.operator: skipped: {reason}", file=sys.stderr)
        return 0
    facts = machine.facts(len(os.sched_getaffinity(0))) | {"quick": options.quick}
    facts["date"] = datetime.now(UTC).isoformat(timespec="minutes")
    print("\n".join(f"{key}: {value}" for key, value in facts.items()) + "\n", flush=True)
    parts = []
    for name in options.only or (QUICK if options.quick else PARTS):
        parts.append(PARTS[name](quick=options.quick))
        print(parts[-1].text(), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "parts": [p.document() for p in parts]}, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer jobs, one round")
    parser.add_argument("--only", action="append", choices=PARTS, default=[], help="a part; may be given again")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
