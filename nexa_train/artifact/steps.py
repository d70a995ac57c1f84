"""Which names of a step are used up, and which one decides: read from a listing. Pure.

Before: `Store.list`. After: `publish`, `retention` and `verify` see steps instead of keys.

The commit of a step is a name that is created once: `manifest.json`. A name that has been deleted could be created
again by a writer that was thought dead, or by a request that was on its way all the time, long after the bytes that it
speaks of are gone. So what decides is never deleted, it is outnumbered: the names of a step are `manifest.json`,
`manifest-2.json`, `manifest-3.json`, ..., and the highest one that exists decides. If it holds a manifest, the step is
committed; if it is empty, the step was given up, and only an attempt that began later may commit it, under the next
name. Whoever wants to change what a step is creates the name after the highest that it saw: of all who saw the same,
the store lets one through. The highest number of a step never falls, as only lower names are ever deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nexa_train.artifact.manifest import CHECKPOINTS, MANIFEST_NAME, parse_step_folder
from nexa_train.store.base import Stored

_NAME = re.compile(r"manifest(?:-([2-9]|[1-9]\d{1,8}))?\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One step's folder as a listing shows it.

    Attributes:
        folder: relative to the store; empty for the folder of a step that was copied out of one.
        generation: the number of the highest name; 0: none is taken.
        committed: whether a manifest is under that name, and not nothing.
        others: the keys of all else in the folder.
    """

    folder: str
    generation: int
    committed: bool
    others: tuple[str, ...]

    @property
    def number(self) -> int:
        """The step; -1 for a folder that no step has."""
        parsed = parse_step_folder(self.folder)
        return parsed[1] if parsed else -1

    @property
    def key(self) -> str:
        """The name that decides."""
        return f"{self.folder}/{manifest_name(self.generation)}".lstrip("/")


def manifest_name(generation: int) -> str:
    """The name of a step's manifest: `manifest.json`, unless what was there before was given up."""
    return MANIFEST_NAME if generation == 1 else f"manifest-{generation}.json"


def step_states(listing: Iterable[Stored]) -> list[StepState]:
    """The steps of a listing, lowest first. Only the place counts: a file of a checkpoint may be called like one."""
    folders: dict[str, list[Stored]] = {}
    for stored in listing:
        segments = stored.key.split("/")
        if len(segments) > 3 and segments[0] == CHECKPOINTS:
            folders.setdefault("/".join(segments[:3]), []).append(stored)
    return sorted((step_state(*item) for item in folders.items()), key=lambda state: (state.number, state.folder))


def step_state(folder: str, objects: Iterable[Stored]) -> StepState:
    """What the objects in the folder of a step, all of them, make of it."""
    sizes = {stored.key: stored.size for stored in objects}
    generation, key = max(((generation_of(key.removeprefix(f"{folder}/")), key) for key in sizes), default=(0, ""))
    others = tuple(sorted(other for other in sizes if not generation or other != key))
    return StepState(folder=folder, generation=generation, committed=generation > 0 and sizes[key] > 0, others=others)


def generation_of(name: str) -> int:
    """The inverse of `manifest_name`; 0 for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1] or 1) if match else 0
