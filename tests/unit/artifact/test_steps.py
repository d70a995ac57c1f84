"""Which name of a step decides."""

from __future__ import annotations

import pytest

from nexa_train.artifact.steps import manifest_name, step_state, step_states
from nexa_train.store.base import Stored

STEP = "checkpoints/run/step-00000050"


def listing(**sizes: int) -> list[Stored]:
    return [Stored(key=f"{STEP}/{name}", size=size) for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("sizes", "generation", "committed"),
    [
        ({}, 0, False),
        ({"data/a1-0/model": 9}, 0, False),
        ({"manifest.json": 9}, 1, True),
        ({"manifest.json": 0}, 1, False),
        ({"manifest.json": 9, "manifest-2.json": 0}, 2, False),
        ({"manifest-2.json": 0}, 2, False),
        ({"manifest-2.json": 0, "manifest-3.json": 9}, 3, True),
        ({"manifest-9.json": 0, "manifest-10.json": 9}, 10, True),
        ({"manifest-1.json": 9, "manifest-02.json": 9, "manifest-.json": 9, "manifest.json.sig": 9}, 0, False),
        ({"manifest.json": 9, "data/a1-0/manifest-2.json": 0, "damaged-ab.json": 9}, 1, True),
    ],
)
def test_the_highest_name_decides(sizes: dict[str, int], generation: int, committed: bool) -> None:
    state = step_state(STEP, listing(**sizes))

    assert (state.generation, state.committed) == (generation, committed)
    deciding = {state.key} if generation else set()
    assert set(state.others) | deciding == {stored.key for stored in listing(**sizes)}


def test_steps_come_in_order_and_nothing_else_is_one() -> None:
    keys = ["step-100000000/manifest.json", "step-00000050/manifest.json", "step-99999999/data/a/b", "run.json", "x"]
    states = step_states(Stored(key=f"checkpoints/run/{key}", size=1) for key in keys)

    assert [(state.number, state.committed) for state in states] == [
        (50, True),
        (99_999_999, False),
        (100_000_000, True),
    ]


def test_names_are_read_as_they_are_written() -> None:
    for generation in (1, 2, 9, 10, 123):
        state = step_state(STEP, listing(**{manifest_name(generation): 1}))

        assert (state.generation, state.key) == (generation, f"{STEP}/{manifest_name(generation)}")
