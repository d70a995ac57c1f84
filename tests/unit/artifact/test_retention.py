"""Closing a step before its bytes go, and sweeping what no checkpoint needs: on memory and in a real folder."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexa_train.artifact.manifest import step_folder
from nexa_train.artifact.publish import Publisher, check_files, committed_folders, newest_valid, read_manifest
from nexa_train.artifact.retention import apply_retention, remove_run
from nexa_train.artifact.verify import verify
from nexa_train.errors import NotFoundError, RefusedError, SupersededError
from nexa_train.store import Store, open_store
from tests.unit.artifact.builders import RUN, draft, files_in, publish_chain


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4()}")
    return open_store(tmp_path / "artifacts")


def upload(store: Store, folder: Path, step: int, attempt: str = "dead") -> tuple[Publisher, Callable[[], Any]]:
    """An attempt that has uploaded a step, and what would commit it."""
    publisher = Publisher(store, RUN, attempt)
    entries = [publisher.upload(step, path, source) for path, source in files_in(folder).items()]
    return publisher, lambda: publisher.commit(step, entries, draft())


def data(store: Store, step: int, attempt: str) -> list[str]:
    return [stored.key for stored in store.list(step_folder(RUN, step)) if f"/data/{attempt}-" in stored.key]


def test_data_that_was_never_committed_goes_once_a_later_step_is(store: Store, tmp_path: Path) -> None:
    upload(store, tmp_path / "dead", 60)
    chain = publish_chain(store, tmp_path, 50, 100)

    assert apply_retention(store, RUN) == []

    assert data(store, 60, "dead") == []
    assert committed_folders(store, RUN) == [one.folder for one in chain]
    assert [check_files(store, one) for one in chain] == [[], []]


def test_data_above_the_newest_checkpoint_may_be_a_living_attempts(store: Store, tmp_path: Path) -> None:
    publish_chain(store, tmp_path, 50)
    _, commit = upload(store, tmp_path / "alive", 100, "alive")

    apply_retention(store, RUN, 1)

    assert check_files(store, commit()) == []


def test_who_lost_a_step_leaves_nothing_there(store: Store, tmp_path: Path) -> None:
    upload(store, tmp_path / "dead", 50)
    [winner] = publish_chain(store, tmp_path, 50)

    apply_retention(store, RUN)

    assert data(store, 50, "dead") == []
    assert check_files(store, winner) == []


@pytest.mark.parametrize("step", [50, 60])
@pytest.mark.parametrize("keep_last", [None, 1])
def test_who_was_thought_dead_and_comes_too_late_commits_nothing(
    store: Store, tmp_path: Path, step: int, keep_last: int | None
) -> None:
    _, commit = upload(store, tmp_path / "dead", step)
    publish_chain(store, tmp_path, 50, 100)
    apply_retention(store, RUN, keep_last)
    before = committed_folders(store, RUN)

    with pytest.raises(SupersededError, match="end this one"):
        commit()

    assert committed_folders(store, RUN) == before
    assert [problem for folder in before for problem in check_files(store, read_manifest(store, folder))] == []


def test_a_manifest_that_arrives_after_its_step_was_retired_is_seen_by_nobody(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path, 50, 100)
    apply_retention(store, RUN, 1)
    store.create(chain[0].key, chain[0].manifest.to_bytes())

    assert committed_folders(store, RUN) == [chain[1].folder]
    with pytest.raises(NotFoundError):
        read_manifest(store, chain[0].folder)
    apply_retention(store, RUN, 1)
    assert chain[0].key not in [stored.key for stored in store.list()]


def test_a_step_that_was_given_up_is_no_problem_of_verify(tmp_path: Path) -> None:
    store = open_store(tmp_path / "artifacts")
    upload(store, tmp_path / "dead", 60)
    publish_chain(store, tmp_path, 50, 100, 150)
    apply_retention(store, RUN, 2)

    report = verify(store.uri)

    assert (report.problems, [one.step for one in report.manifests]) == ((), [100, 150])


def test_after_damage_a_step_that_was_given_up_can_be_committed_by_who_resumes(store: Store, tmp_path: Path) -> None:
    chain = publish_chain(store, tmp_path / "first", 50, 100)
    apply_retention(store, RUN, 1)
    store.delete(f"{chain[1].folder}/{chain[1].manifest.files[0].object}")
    late = Publisher(store, RUN, "late")
    publisher = Publisher(store, RUN, "a2")
    assert publisher.resume().committed is None

    again = [publisher.publish(step, files_in(tmp_path / "again"), draft()) for step in (50, 100)]

    assert newest_valid(store, RUN).committed == again[1]
    assert [check_files(store, one) for one in again] == [[], []]
    with pytest.raises(SupersededError):
        late.publish(50, files_in(tmp_path / "late"), draft())


def test_a_checkpoint_that_is_retired_while_it_is_read_is_not_damaged(tmp_path: Path) -> None:
    base = open_store(tmp_path / "artifacts")
    publish_chain(base, tmp_path / "source", 50, 100)

    class Overtaken(type(base)):  # type: ignore[misc]
        """The same folder; while its newest checkpoint is read, another attempt commits and thins out."""

        overtaken = False

        def open(self, key: str, *, version_id: str | None = None) -> Any:
            if "step-00000100/data" in key and not self.overtaken:
                self.overtaken = True
                publisher = Publisher(base, RUN, "a2")
                publisher.publish(150, files_in(tmp_path / "later"), draft())
                apply_retention(base, RUN, 1)
            return super().open(key, version_id=version_id)

    found = newest_valid(Overtaken(tmp_path / "artifacts"), RUN)

    assert found.damaged == []
    assert found.committed is not None
    assert found.committed.manifest.step == 150


def test_a_run_is_removed_whole_and_no_other_with_it(store: Store, tmp_path: Path) -> None:
    publish_chain(store, tmp_path, 10, 20)
    store.create("checkpoints/other/run.json", b"{}")
    store.create(f"checkpoints/{RUN}/run.json", b"{}")
    before = len(store.list(f"checkpoints/{RUN}/"))
    assert remove_run(store, RUN) == before > 4
    assert [stored.key for stored in store.list("checkpoints/")] == ["checkpoints/other/run.json"]
    assert remove_run(store, RUN) == 0


def test_a_removal_cut_short_anywhere_leaves_whole_checkpoints_or_none_and_can_be_found(tmp_path: Path) -> None:
    for survives in range(1, 6):
        store = open_store(tmp_path / f"artifacts-{survives}")
        publish_chain(store, tmp_path / f"files-{survives}", 10, 20)
        store.create(f"checkpoints/{RUN}/run.json", b"{}")
        left = Reluctant(store, survives)
        with pytest.raises(RefusedError):
            remove_run(left, RUN)
        for folder in committed_folders(store, RUN):
            assert check_files(store, read_manifest(store, folder)) == []
        assert f"checkpoints/{RUN}/run.json" in [stored.key for stored in store.list(f"checkpoints/{RUN}/")]
        remove_run(store, RUN)
        assert store.list(f"checkpoints/{RUN}/") == []


class Reluctant:
    """A store that deletes so many objects and no more."""

    def __init__(self, store: Store, number: int) -> None:
        self.store, self.number = store, number
        self.list, self.uri = store.list, store.uri

    def delete(self, key: str) -> None:
        self.number -= 1
        if self.number < 0:
            raise RefusedError(f"{key}: no more")
        self.store.delete(key)


STRAYS = ["manifest.json~", "notes (1).txt", "data/a1-00000000/ü.bin"]


def put_strays(root: Path, folder: str) -> list[str]:
    """What somebody else's program leaves in a step's folder; returns the keys."""
    for name in STRAYS:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return [f"{folder}/{name}" for name in STRAYS]


def keys_of(store: Store, folder: str) -> set[str]:
    return {stored.key for stored in store.list(folder)}


def test_a_stray_object_is_left_and_named_and_its_step_is_retired_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "artifacts"
    store = open_store(root)
    chain = publish_chain(store, tmp_path / "source", 50, 100, 150)
    strays = {*put_strays(root, chain[0].folder), *put_strays(root, chain[2].folder)}

    assert apply_retention(store, RUN, 2) == [50]
    said = capfd.readouterr().err
    assert [apply_retention(store, RUN, 2) for _ in range(3)] == [[], [], []]

    assert all(name.rpartition("/")[2] in said for name in STRAYS)
    assert capfd.readouterr().err == ""
    assert keys_of(store, chain[0].folder) - strays == {f"{chain[0].folder}/manifest-2.json"}
    assert strays <= keys_of(store, "")
    assert check_files(store, chain[2]) == []


@pytest.mark.parametrize("committed", [True, False])
def test_a_step_is_closed_once_where_nothing_may_be_deleted_and_cleared_once_it_may(
    store: Store, tmp_path: Path, committed: bool
) -> None:
    if committed:
        publish_chain(store, tmp_path / "source", 50)
    else:
        upload(store, tmp_path / "dead", 50)
    publish_chain(store, tmp_path / "source", 100)
    folder, denying = step_folder(RUN, 50), Denying(store)

    for _ in range(4):
        with pytest.raises(RefusedError, match="denied"):
            apply_retention(denying, RUN, 1)

    names = {key for key in keys_of(store, folder) if "/manifest" in key}
    assert names == {
        f"{folder}/{name}" for name in (["manifest.json", "manifest-2.json"] if committed else ["manifest.json"])
    }
    apply_retention(store, RUN, 1)
    assert [stored.size for stored in store.list(folder)] == [0]


def test_what_a_late_attempt_uploads_to_a_closed_step_still_closes_it_to_that_attempt(
    store: Store, tmp_path: Path
) -> None:
    chain = publish_chain(store, tmp_path / "source", 50, 100)
    apply_retention(store, RUN, 1)
    publisher = Publisher(store, RUN, "late")
    publisher._given_up = {50: 2}  # as one that resumed between the two
    entries = [publisher.upload(50, path, source) for path, source in files_in(tmp_path / "late").items()]
    apply_retention(store, RUN, 1)

    with pytest.raises(SupersededError):
        publisher.commit(50, entries, draft())

    assert committed_folders(store, RUN) == [chain[1].folder]


def test_a_run_with_strays_is_removed_but_for_those_which_are_named(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    store = open_store(root)
    chain = publish_chain(store, tmp_path / "source", 50, 100)
    store.create(f"checkpoints/{RUN}/run.json", b"{}")
    strays = {*put_strays(root, chain[0].folder)}
    copied = root / f"{chain[1].folder} (copy)"
    shutil.copytree(root / chain[1].folder, copied)
    (copied / "manifest-2.json").write_text("{}")
    strays |= {str(path.relative_to(root)) for path in copied.rglob("*") if path.is_file()}

    with pytest.raises(RefusedError, match=r"cannot be removed by nexa, which wrote all else; remove by hand"):
        remove_run(store, RUN)

    assert keys_of(store, "") == strays


def test_while_a_run_is_removed_no_step_that_was_retired_comes_back(store: Store, tmp_path: Path) -> None:
    publish_chain(store, tmp_path / "source", 50, 100)
    with pytest.raises(RefusedError):
        apply_retention(Denying(store), RUN, 1)
    seen: list[list[str]] = []

    class Looking(Reluctant):
        def delete(self, key: str) -> None:
            super().delete(key)
            seen.append(committed_folders(store, RUN))

    remove_run(Looking(store, 1000), RUN)

    assert all(step_folder(RUN, 50) not in folders for folders in seen)


class Denying(Reluctant):
    """A store that lets nothing be deleted."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, 0)
        self.create, self.open, self.uri = store.create, store.open, store.uri

    def delete(self, key: str) -> None:
        raise RefusedError(f"{key}: denied")
