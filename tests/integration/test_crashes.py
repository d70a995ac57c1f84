"""The operator is killed at each of its writes, and its API server lies, refuses, and falls silent: one thing a plan.

A plan is one job's life, of those in `lives.py`. However it was disturbed, it must end as the undisturbed one, with the
same children made, and none of them twice.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import pytest

from tests.cluster import host
from tests.cluster.api_proxy import FAULTS, Fault, Story, What
from tests.cluster.control_plane import ControlPlane, start_control_plane
from tests.cluster.controllers import start_jobset
from tests.cluster.errors import TimedOut
from tests.integration.harness import prepare_operator
from tests.integration.lane import KEEPER, Lane, new_lane
from tests.integration.lives import LIVES, End, Life

pytestmark = pytest.mark.integration

SEED = int(os.environ.get("NEXA_SOAK_SEED", "1"))
LANES = int(os.environ.get("NEXA_SOAK_LANES", "3"))
"""Of each sort, at once: a life mostly waits."""
SHORT_KILLS, OTHER_KILLS = 20, 6
"""Of the first life, and of each other one, in the short form."""
SETTLED_SECONDS = 10
BRISK = {"NEXA_RESYNC_INTERVAL_SECONDS": "3", "NEXA_WATCH_SILENCE_SECONDS": "4"}
"""What only a resync or a new watch mends takes a minute as set by default; here the minute is three seconds."""

Strike = tuple[tuple[What, int], Fault]


def strikes(counts: Counter[What]) -> list[Strike]:
    """At every write of an undisturbed life, and at some of its many lists, reads and events."""
    strides: dict[What, int] = {"write": 1, "list": 3, "read": 3, "event": 7}
    numbers = {what: range(1, counts[what] + 1, stride) for what, stride in strides.items()}
    numbers["watch"] = range(1, 3)
    assert all(numbers[what] for what in FAULTS), f"of these there was none: {counts}"
    return [((what, number), fault) for what, faults in FAULTS.items() for number in numbers[what] for fault in faults]


def sort(strike: Strike) -> tuple[What, Fault]:
    """What befalls what, wherever in a life."""
    (what, _), fault = strike
    return what, fault


def some_of_each_sort(possible: Sequence[Strike], counts: Counter[What], draw: random.Random) -> list[Strike]:
    """One of each, in the middle of a life: not every life has as many lists, and before the first there is no past."""
    sorts: dict[tuple[What, Fault], list[Strike]] = {}
    for strike in possible:
        (what, number), _ = strike
        if what == "watch" or counts[what] / 4 <= number <= counts[what] * 3 / 4:
            sorts.setdefault(sort(strike), []).append(strike)
    assert sorts.keys() == {sort(strike) for strike in possible}
    return [draw.choice(each) for each in sorts.values()]


def carry_out(lane: Lane, life: Life, name: str, strike: Strike | None, expected: End | None) -> tuple[Story, End]:
    """One plan; raises with the whole story if it ends otherwise than expected."""
    story = Story(job=name, strikes=dict([strike] if strike else []))
    lane.begin(story)
    try:
        ended = life.lead(lane, name)
        assert expected in (None, ended)
        assert sorted(story.created) == [child.replace("/", f"/{name}") for child in life.made]
        assert set(story.created.values()) == {1}, f"created more than once: {story.created}"
        assert lane.alive, "the operator ended by itself"
    except (AssertionError, TimedOut) as exc:
        exc.add_note("\n".join([f"strike {strike}", *story.log]))
        raise
    lane.api.delete(lane.path("nexatrainingjobs", name))
    return story, ended


@dataclass
class Lanes:
    """Some operators as users run them, and some that are brisk."""

    plain: list[Lane]
    brisk: list[Lane]

    def carry_out(self, life: Life, chosen: Sequence[Strike], expected: End) -> list[Story]:
        """All of them, each lane one after the other."""
        sorts: dict[bool, SimpleQueue[Strike]] = {True: SimpleQueue(), False: SimpleQueue()}
        for strike in chosen:
            sorts[strike[0][0] == "write"].put(strike)
        done: list[Story] = []

        def work(lane: Lane, strikes: SimpleQueue[Strike]) -> None:
            while True:
                try:
                    strike = strikes.get_nowait()
                except Empty:
                    return
                name = f"{life.name}-{'-'.join(map(str, strike[0]))}-{strike[1].replace(' ', '-')}"
                done.append(carry_out(lane, life, name, strike, expected)[0])

        lanes = [(lane, sorts[True]) for lane in self.plain] + [(lane, sorts[False]) for lane in self.brisk]
        with ThreadPoolExecutor(len(lanes)) as pool:
            for future in [pool.submit(work, *each) for each in lanes]:
                future.result()
        return done

    @property
    def settled(self) -> list[tuple[float, float]]:
        return [seconds for lane in self.plain for seconds in lane.settled]

    def forget(self) -> None:
        """How long it took them to settle so far."""
        for lane in self.plain:
            lane.settled.clear()


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """One of its own, where JobSet's CRD and webhooks stay."""
    host.require_control_plane()
    started = start_control_plane()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def lanes(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lanes]:
    start_jobset(plane)
    folder = tmp_path_factory.mktemp("lanes")
    kubeconfig = prepare_operator(plane, folder)
    nodes = plane.fake_nodes(4 * LANES, keeper=KEEPER, pods="wait")
    with ExitStack() as stack:

        def lane(name: str, **environment: str) -> Lane:
            own = (nodes.pop(), nodes.pop())
            return stack.enter_context(new_lane(plane, kubeconfig, folder / name, nodes=own, **environment))

        plain = [lane(f"plain-{number}") for number in range(LANES)]
        yield Lanes(plain, [lane(f"brisk-{number}", **BRISK) for number in range(LANES)])


@pytest.fixture(scope="module", params=LIVES, ids=[life.name for life in LIVES])
def life(request: pytest.FixtureRequest) -> Life:
    chosen: Life = request.param
    return chosen


@pytest.fixture(scope="module")
def undisturbed(lanes: Lanes, life: Life) -> tuple[Story, End]:
    return carry_out(lanes.plain[0], life, f"{life.name}-undisturbed", None, None)


def test_an_undisturbed_life(life: Life, undisturbed: tuple[Story, End]) -> None:
    story, ended = undisturbed
    print(f"in an undisturbed life: {story.counts}")
    assert {key: ended.status[key] for key in life.ends} == life.ends
    assert ended.told == life.told


def p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def came_about(done: Sequence[Story]) -> Counter[tuple[What, Fault]]:
    return sum((story.struck for story in done), Counter())


def missing(planned: Sequence[Strike], done: Sequence[Story]) -> set[tuple[What, Fault]]:
    return {sort(strike) for strike in planned} - came_about(done).keys()


def check(lanes: Lanes, planned: Sequence[Strike], done: list[Story], *, num_struck: int) -> None:
    struck = came_about(done)
    settled, own = p95([took for took, _ in lanes.settled]), p95([took - waited for took, waited in lanes.settled])
    kinds = ", ".join(f"{what}: {fault} {count}" for (what, fault), count in sorted(struck.items()))
    print(f"{len(done)} plans, {struck.total()} struck: {kinds}; {len(lanes.settled)} restarts")
    print(f"settled in {settled:.1f} s (p95), {own:.1f} s without the time that other work had the processors")
    assert not missing(planned, done), "planned, and never came about"
    assert struck.total() >= num_struck
    assert own <= SETTLED_SECONDS
    for lane in (*lanes.plain, *lanes.brisk):
        assert not [said for said in lane.operator.said if said["event"] == "look failed" and "exception" in said]


def test_struck_anywhere(lanes: Lanes, life: Life, undisturbed: tuple[Story, End]) -> None:
    story, expected = undisturbed
    lanes.forget()
    # An answer that never comes costs the half minute that the operator waits for it: in the soak.
    quick = [strike for strike in strikes(story.counts) if strike[1] != "no answer"]
    kills = [strike for strike in quick if strike[1].startswith("kill")]
    others = [strike for strike in quick if strike not in kills]
    draw = random.Random(SEED)
    each = some_of_each_sort(others, story.counts, draw)
    if life is LIVES[0]:
        chosen = draw.sample(kills, SHORT_KILLS) + each
    else:  # of the other sorts each befalls one of the other lives
        chosen = draw.sample(kills, OTHER_KILLS) + each[LIVES.index(life) - 1 :: len(LIVES) - 1]
    done = lanes.carry_out(life, chosen, expected)
    # Lives differ in how often they list, and in what a list said before: what did not come about does so elsewhere.
    spare = [strike for strike in others if strike not in chosen]
    while missed := {sort(strike): strike for strike in spare if sort(strike) in missing(chosen, done)}:
        done += lanes.carry_out(life, [*missed.values()], expected)
        spare = [strike for strike in spare if strike not in missed.values()]
    check(lanes, chosen, done, num_struck=len(chosen) * 3 // 4)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_struck_everywhere(lanes: Lanes, life: Life, undisturbed: tuple[Story, End]) -> None:
    story, expected = undisturbed
    lanes.forget()
    possible = strikes(story.counts)
    random.Random(SEED).shuffle(possible)
    began = time.monotonic()
    done = lanes.carry_out(life, possible, expected)
    print(f"{story.counts} in an undisturbed life; all in {time.monotonic() - began:.0f} s")
    check(lanes, possible, done, num_struck=len(possible) * 9 // 10)
