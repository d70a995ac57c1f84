"""The folder store when things go wrong: crashes, permissions, concurrent deletes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nexa_train.errors import RefusedError
from nexa_train.store import open_store

WRITE_FOR_EVER = """
import sys, itertools
from nexa_train.store import open_store
store = open_store(sys.argv[1])
for number in itertools.count():
    store.create(f"objects/{number}", b"%d " % number * 200_000)
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    for delay_seconds in (0.0, 0.013, 0.029):
        folder = tmp_path / str(delay_seconds)
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, folder], stdout=subprocess.PIPE)
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(delay_seconds)
        writer.send_signal(signal.SIGKILL)
        confirmed = writer.communicate()[0].split()
        store = open_store(folder)

        keys = [stored.key for stored in store.list()]
        assert len(keys) > len(confirmed)
        for key in keys:
            number = key.rpartition("/")[2].encode()
            assert store.open(key).read() == (number + b" ") * 200_000


def temporaries(folder: Path) -> list[Path]:
    return list((folder / ".nexa" / "tmp").iterdir())


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next_probe(tmp_path: Path) -> None:
    die_while_writing = "import os, sys; os.link = lambda *_: os.kill(os.getpid(), 9)\n" + WRITE_FOR_EVER
    subprocess.run([sys.executable, "-c", die_while_writing, tmp_path], check=False)
    assert len(temporaries(tmp_path)) == 1

    open_store(tmp_path).probe()

    assert temporaries(tmp_path) == []


def test_what_a_living_writer_has_half_written_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    seen: list[int] = []

    def probed_before(source: Path, target: Path) -> None:
        if "probe" not in target.parts:
            open_store(tmp_path).probe()
            seen.append(len(temporaries(tmp_path)))
        link(source, target)

    monkeypatch.setattr(os, "link", probed_before)
    open_store(tmp_path).create("k", b"whole")

    assert seen == [1]
    assert open_store(tmp_path).open("k").read() == b"whole"


def probe_before_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next file that is written found by another start's probe when it has its name, and not yet its lock."""
    lock, probes = fcntl.flock, [open_store(folder).probe]

    def probed_before(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and probes:
            probes.pop()()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", probed_before)


def test_a_file_that_a_probe_finds_before_it_is_locked_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_before_the_lock(tmp_path, monkeypatch)
    open_store(tmp_path).create("k", b"whole")

    assert open_store(tmp_path).open("k").read() == b"whole"
    assert temporaries(tmp_path) == []


def test_a_file_that_is_committed_is_the_one_that_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    sync: Callable[[int], None] = os.fsync
    synced: list[tuple[int, int]] = []

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    probe_before_the_lock(tmp_path / "store", monkeypatch)
    stored = open_store(tmp_path / "store").create("k", source)

    assert ((tmp_path / "store" / "k").stat().st_ino, 3_000_000) in synced
    assert (tmp_path / "store" / "k").read_bytes() == source.read_bytes()
    assert stored.size == 3_000_000


def test_a_file_that_another_machine_deletes_which_sees_no_lock_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync: Callable[[int], None] = os.fsync
    swept: list[Path] = []

    def swept_after(descriptor: int) -> None:
        sync(descriptor)
        if not swept:
            swept.extend(temporaries(tmp_path))
            swept[0].unlink()

    monkeypatch.setattr(os, "fsync", swept_after)

    assert open_store(tmp_path).create("k", b"whole").size == 5
    assert open_store(tmp_path).open("k").read() == b"whole"


def test_a_folder_is_made_by_the_first_write_and_not_by_a_look(tmp_path: Path) -> None:
    store = open_store(tmp_path / "artifacts")

    assert store.list() == []
    assert not (tmp_path / "artifacts").exists()


def test_deleting_the_last_object_removes_its_folders(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create("a/b/c", b"")
    store.delete("a/b/c")

    assert not (tmp_path / "a").exists()
    assert tmp_path.exists()


def test_writes_survive_deletes_that_prune_the_folder_beneath_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)

    def write_and_delete(number: int) -> None:
        for turn in range(100):
            store.create(f"shared/folder/{number}-{turn}", b"x")
            store.delete(f"shared/folder/{number}-{turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))

    assert store.list() == []


def test_a_later_change_of_the_source_does_not_reach_the_object(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"before")
    store = open_store(tmp_path / "artifacts")
    store.create("k", source)
    source.write_bytes(b"after!")

    assert store.open("k").read() == b"before"


def test_a_path_that_is_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("not a folder")

    with pytest.raises(RefusedError, match="artifacts"):
        open_store(tmp_path / "artifacts").probe()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_with_its_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(RefusedError, match="Permission denied"):
        open_store(tmp_path).probe()


def test_a_disk_that_fails_while_it_is_read_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "k").symlink_to("/proc/self/mem")  # whose first byte is nobody's: the kernel answers EIO

    with open_store(tmp_path).open("k") as stream, pytest.raises(RefusedError, match=r"k in .*: Input/output"):
        stream.read(1)


def test_a_folder_that_cannot_be_listed_is_refused_and_does_not_pass_for_an_empty_one(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create("run/k", b"x")
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(RefusedError, match="cannot list loop in"):
        store.list("loop")
    assert store.list("none") == store.list("run/k") == []
