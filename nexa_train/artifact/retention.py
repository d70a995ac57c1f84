"""Deleting checkpoints that are too many, and bytes that no checkpoint needs.

Before: `nexa_train.pipeline` has committed a step. After: nothing; what is gone is gone.

No clock and no lease says here which attempt is alive: a paused process wakes up whenever it likes. Instead a step is
closed before a byte of it goes, by taking the name (`steps`) under which it could still be committed:

- A step that holds a manifest is closed by the name after it, so readers do not see it any more.
- A step that holds none, below the newest committed one, is closed by the name that its commit would need. An attempt
  that is still uploading there is behind another one and learns it when it commits: it is superseded.
- Above the newest committed step nothing is touched: it may be the next step of an attempt that lives.

Only objects are deleted that were listed before the step was closed. An attempt that may still commit the step began
after that, and its objects are not among them, because their folder bears its own nonce. So there is no moment at
which a committed manifest lacks bytes, whoever is killed or paused, and whatever request arrives late.
A step that was closed keeps one empty object, its name, for the life of the run.

Objects under names that no store takes (`check_key`) are not Nexa's. They are left where they are and named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from nexa_train.artifact.manifest import RUN_NAME, run_folder
from nexa_train.artifact.publish import parallel, read_manifest, run_steps, step_now
from nexa_train.artifact.steps import StepState, generation_of, manifest_name, step_states
from nexa_train.errors import AlreadyExistsError, ConfigError, DamagedError, NotFoundError, RefusedError
from nexa_train.store.base import Store, is_key

_SHOWN = 5


def apply_retention(store: Store, run_id: str, keep_last: int | None = None) -> list[int]:
    """Delete all but the newest `keep_last` checkpoints, oldest first, and return the steps that went.

    Data of attempts that never committed goes too, up to the newest committed step. Call it after a commit.

    Args:
        keep_last: None: every committed checkpoint stays.

    Raises:
        ConfigError: `keep_last` is less than one, which would delete the newest.
        RefusedError: the store said no half-way; the next call goes on.
    """
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"keep_last is {keep_last}, expected at least 1: the newest checkpoint always stays")
    steps = run_steps(store, run_id)
    committed = [step for step in steps if step.committed]
    if not committed:
        return []
    kept = committed[-keep_last:] if keep_last else committed
    older = [step for step in steps if step.number < kept[-1].number and step not in kept]
    for step in kept:
        _sweep_losers(store, step)
    return [step.number for step in older if _retire(store, step) and step.committed]


def remove_run(store: Store, run_id: str) -> int:
    """Delete all of a run and return how many objects that were; none of its processes may be alive.

    What makes a checkpoint visible goes first, and what names the run last: whoever looks meanwhile sees whole
    checkpoints or none, and a removal that was cut short can be found and taken up again.

    Raises:
        RefusedError: the store said no half-way, and the next call goes on; or all of Nexa's is gone, and the folder
            still holds what somebody else has put there.
    """
    root = run_folder(run_id)
    listing = [stored for stored in store.list(f"{root}/") if is_key(stored.key)]
    keys = [stored.key for stored in listing]
    steps = step_states(listing)
    # A step's highest name is the last to go, or a lower one, which it outnumbers, would count again.
    deciding = [step.key for step in steps if step.generation]
    outnumbered = [key for step in steps for key in step.others if _outnumbered(step, key)]
    identity = f"{root}/{RUN_NAME}"
    rest = [key for key in keys if key not in {identity, *deciding, *outnumbered}]
    for group in (outnumbered, deciding, rest, [identity] if identity in keys else []):
        _delete(store, group)
    if left := [stored.key for stored in store.list(f"{root}/")]:
        raise RefusedError(
            f"{_named(left)} in {store.uri} cannot be removed by nexa, which wrote all else; remove by hand"
        )
    return len(keys)


def _retire(store: Store, step: StepState) -> bool:
    """Close a step and delete what was seen in it; False: nothing was there, or another attempt is at it."""
    if step.generation and not step.committed:
        return _clear(store, step)
    keys = [key for key in step.others if is_key(key)]
    if not step.committed and not keys:
        return False
    if not _close(store, step):
        return False
    if strays := [key for key in step.others if not is_key(key)]:
        print(
            f"nexa: warning: {_named(strays)} in {store.uri} stay: nexa writes no such names",
            file=sys.stderr,
            flush=True,
        )
    _delete(store, keys)
    return True


def _clear(store: Store, step: StepState) -> bool:
    """Delete what a closed step still holds: a deletion was cut short or denied, or a late attempt uploaded.

    A further name is taken only for uploads, which may be those of an attempt that began after the step was closed,
    and only once the store has let something be deleted. Otherwise each save would take one, for as long as the store
    denies deletion or somebody's own objects lie there.
    """
    uploads = [key for key in step.others if is_key(key) and _is_upload(step, key)]
    rest = [key for key in step.others if _outnumbered(step, key) or key.startswith(f"{step.folder}/damaged-")]
    _delete(store, filter(is_key, rest))
    if not uploads:
        return False
    if not rest:
        store.delete(f"{step.folder}/nothing")  # which is no object's name: a store answers no to that, too
    if not _close(store, step):
        return False
    _delete(store, uploads)
    return True


def _close(store: Store, step: StepState) -> bool:
    """Take the next name, after which the one before counts no more; False: another attempt has taken it."""
    try:
        store.create(f"{step.folder}/{manifest_name(step.generation + 1)}", b"")
    except AlreadyExistsError:
        return False
    if step.generation:
        store.delete(step.key)
    return True


def _is_upload(step: StepState, key: str) -> bool:
    return key.startswith(f"{step.folder}/data/") and key.count("/") > step.folder.count("/") + 2


def _outnumbered(step: StepState, key: str) -> bool:
    return generation_of(key.removeprefix(f"{step.folder}/")) > 0 and key != step.key


def _sweep_losers(store: Store, step: StepState) -> None:
    """Delete what others uploaded to a committed step. They cannot commit it: its name is taken.

    Unless it was given up in the meantime, so the step is looked at once more: an attempt that may commit it again
    began after that, and so did its uploads.
    """
    data = [key for key in step.others if is_key(key) and _is_upload(step, key)]
    if len({key.removeprefix(f"{step.folder}/data/").partition("/")[0] for key in data}) < 2:
        return
    try:
        files = read_manifest(store, step.folder).manifest.files
    except (DamagedError, NotFoundError):
        return  # for the next attempt to judge
    named = {f"{step.folder}/{entry.object}" for entry in files}
    if step_now(store, step.folder).key == step.key:
        _delete(store, (key for key in data if key not in named))


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more


def _delete(store: Store, keys: Iterable[str]) -> None:
    parallel(store.delete, keys)
