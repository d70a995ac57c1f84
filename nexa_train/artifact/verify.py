"""Proving that artifacts are what their manifests say, byte by byte.

Before: `nexa verify URI`. After: nothing; it only reads. A URI may name one manifest, the folder of a step, of
a run, or a whole store of artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from nexa_train.artifact.manifest import CHECKPOINTS, MANIFEST_NAME, Manifest, parse_step_folder
from nexa_train.artifact.publish import Committed, check_files, read_manifest, run_steps, still_there
from nexa_train.artifact.steps import generation_of, step_state, step_states
from nexa_train.errors import ConfigError, DamagedError, NotFoundError
from nexa_train.store import address, open_store
from nexa_train.store.base import Store

# Each further look means that all that was found has been deleted in the meantime.
_LOOKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """One manifest that could be read."""

    uri: str
    digest: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` saw.

    Attributes:
        manifests: those that could be read, by URI.
        num_files: files that were named by them and read.
        num_bytes: their size together.
        problems: what is wrong, one line each, sorted; empty if all is well.
    """

    manifests: tuple[Verified, ...]
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as committed."""
        return not self.problems


def verify(uri: str) -> Report:
    """Check every checkpoint at or below `uri`: manifest, place, parent, and each file's size and sha256.

    A parent that retention has deleted is no problem, nor is a checkpoint that retention deletes while it is read.

    Raises:
        NotFoundError: there is no manifest at or below `uri`.
        RefusedError: the store could not be read.
        ConfigError: the URI is of no supported kind.
    """
    for _ in range(_LOOKS):
        store, folders = _found(uri)
        committed, problems = _checked(store, folders)
        if committed or problems or not folders:
            break
    if not committed and not problems:
        raise NotFoundError(f"no {MANIFEST_NAME} at or below {uri}")
    problems += _parent_problems(store, committed)
    files = [entry for one in committed for entry in one.manifest.files]
    return Report(
        manifests=tuple(
            Verified(uri=f"{store.uri}/{one.key}", digest=one.digest, step=one.manifest.step) for one in committed
        ),
        num_files=len(files),
        num_bytes=sum(entry.size for entry in files),
        problems=tuple(sorted(problems)),
    )


def split_artifact_uri(uri: str) -> tuple[str, str]:
    """The store that holds an artifact, and the artifact's key in it.

    The store ends where `checkpoints/` begins: `s3://models/team/checkpoints/run/step-00000050` is
    `("s3://models/team", "checkpoints/run/step-00000050")`. Without such a folder the URI names a store, or
    the manifest of a single checkpoint that was copied out of one.

    Raises:
        ConfigError: nothing is named, or s3:// with a `#` or `?`.
    """
    scheme, path = _split_scheme(uri)
    head, separator, rest = f"{path}/".rpartition(f"/{CHECKPOINTS}/")
    if separator:
        return f"{scheme}{head}" or "/", f"{CHECKPOINTS}/{rest}".rstrip("/")
    return _store_or_copy(scheme, path)


def _store_or_copy(scheme: str, path: str) -> tuple[str, str]:
    folder, slash, name = path.rpartition("/")
    if slash and generation_of(name):
        return f"{scheme}{folder}" or "/", name
    return f"{scheme}{path}" or "/", ""


def _split_scheme(uri: str) -> tuple[str, str]:
    """What opens the store (`s3://BUCKET`, or nothing for this machine), and the path within."""
    named = address.parse(uri)
    if named.is_local:
        if not named.path:
            raise ConfigError(f"artifact {uri!r} names nothing; expected a manifest.json, a step, a run or a store")
        return "", os.path.abspath(address.local_path(named.path)).rstrip("/")
    return f"{named.scheme}://{named.host}", named.path.rstrip("/")


def _found(uri: str) -> tuple[Store, list[str]]:
    """The store, and the folders of checkpoints in it at or below `uri`.

    A store, or a checkpoint that was copied out of one, may itself lie in or below a folder called `checkpoints`. So
    where nothing is found by the last of that name, all of the URI names the place. Not where a step is named: what it
    lacks is not to be found as something else, such as a manifest that was given up.
    """
    store_uri, key = split_artifact_uri(uri)
    store = open_store(store_uri)
    folders = _folders(store, key)
    if folders or not key.startswith(CHECKPOINTS) or parse_step_folder("/".join(key.split("/")[:3])):
        return store, folders
    store_uri, key = _store_or_copy(*_split_scheme(uri))
    store = open_store(store_uri)
    return store, _folders(store, key)


def _folders(store: Store, key: str) -> list[str]:
    """The folders at or below `key` that hold the manifest of a checkpoint, sorted; the top of a copy is empty."""
    folder, _, name = key.rpartition("/")
    place = folder if generation_of(name) else key
    below = store.list(place)
    copied = [] if place else [step_state("", below)]
    states = [state for state in [*copied, *step_states(below)] if state.committed]
    return [state.folder for state in states if place == key or state.key == key]


def _checked(store: Store, folders: Iterable[str]) -> tuple[list[Committed], list[str]]:
    """Those that are there still when they have been read, and what is wrong with them."""
    committed, problems = _read_all(store, folders)
    for one in list(committed):
        found = check_files(store, one)
        if found and not still_there(store, one):
            committed.remove(one)
        else:
            problems += found
    return committed, problems


def _read_all(store: Store, folders: Iterable[str]) -> tuple[list[Committed], list[str]]:
    committed, problems = [], []
    for folder in folders:
        try:
            committed.append(read_manifest(store, folder))
        except NotFoundError:
            continue  # deleted since it was listed
        except (DamagedError, ConfigError) as exc:
            problems.append(str(exc))
    return committed, problems


def _parent_problems(store: Store, committed: Iterable[Committed]) -> list[str]:
    by_run: dict[str, list[Committed]] = {}
    for one in committed:
        if one.folder:  # a copy taken out of its run has no relatives to look at
            by_run.setdefault(one.manifest.run_id, []).append(one)
    problems = []
    for run_id, checked in by_run.items():
        states = run_steps(store, run_id)
        retained, _ = _read_all(store, (state.folder for state in states if state.committed))
        steps = {one.digest: one.manifest.step for one in retained}
        closed = {state.number for state in states if state.generation and not state.committed}
        problems += [problem for one in checked if (problem := _parent_problem(one, steps, closed))]
    return problems


def _parent_problem(one: Committed, steps: Mapping[str, int], closed: Set[int]) -> str | None:
    """Retention deletes the oldest first, so a parent may be missing from the oldest step left, and from one that is
    gone meanwhile. From a later one only if the parent was older than what an attempt that was thought dead committed.
    """
    parent, step = one.manifest.parent, one.manifest.step
    if parent is None:
        return None
    if parent not in steps:
        if step <= min(steps.values(), default=step) or _parent_step(one.manifest) in closed:
            return None
        return f"{one.folder}: its parent {parent} is not in the run, though older checkpoints are"
    if steps[parent] >= step:
        return f"{one.folder}: its parent {parent} is step {steps[parent]}, which is not before step {step}"
    return None


def _parent_step(manifest: Manifest) -> int | None:
    """Which step a checkpoint was trained from: the one before the first that it has logged; None: it has none."""
    first = manifest.logs[0] if manifest.logs else None
    return first["step"] - 1 if isinstance(first, dict) and isinstance(first.get("step"), int) else None
