"""Proving that artifacts are what their manifests say, byte by byte.

Before: `nexa verify URI`. After: nothing; it only reads. A URI may name one manifest, the folder of a step, of
a run, or a whole store of artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nexa_train.artifact.manifest import CHECKPOINTS, MANIFEST_NAME, parse_step_folder
from nexa_train.artifact.publish import Committed, check_files, committed_folders, read_manifest, still_there
from nexa_train.artifact.steps import generation_of, step_state, step_states
from nexa_train.errors import ConfigError, DamagedError, NotFoundError
from nexa_train.store import address, open_store
from nexa_train.store.base import Store


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

    A parent that retention has deleted is no problem: its absence counts only where an older step is there. Nor is a
    checkpoint that retention deletes while it is read.

    Raises:
        NotFoundError: there is no manifest at or below `uri`.
        RefusedError: the store could not be read.
        ConfigError: the URI is of no supported kind.
    """
    store, folders = _found(uri)
    if not folders:
        raise NotFoundError(f"no {MANIFEST_NAME} at or below {uri}")
    committed, problems = _read_all(store, folders)
    for one in list(committed):
        found = check_files(store, one)
        if found and not still_there(store, one):
            committed.remove(one)
        else:
            problems += found
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
        return "", os.path.abspath(Path(named.path).expanduser()).rstrip("/")
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
        retained, _ = _read_all(store, committed_folders(store, run_id))
        steps = {one.digest: one.manifest.step for one in retained}
        problems += [problem for one in checked if (problem := _parent_problem(one, steps))]
    return problems


def _parent_problem(one: Committed, steps: Mapping[str, int]) -> str | None:
    """Retention deletes the oldest first, so a parent may only be missing from the oldest step left."""
    parent, step = one.manifest.parent, one.manifest.step
    if parent is None:
        return None
    if parent not in steps:
        if step == min(steps.values(), default=step):
            return None
        return f"{one.folder}: its parent {parent} is not in the run, though older checkpoints are"
    if steps[parent] >= step:
        return f"{one.folder}: its parent {parent} is step {steps[parent]}, which is not before step {step}"
    return None
