"""What is kept between runs: in one place, and whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nexa_train.cache import ABANDONED_SECONDS, cache_folder, discard, made_whole
from nexa_train.errors import ConfigError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NEXA_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own/data"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/nexa/data"),
        ({}, ".cache/nexa/data"),
    ],
    ids=["its own variable", "the desktop's", "the home"],
)
def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("NEXA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"HOME": "{}"}).items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert cache_folder("data") == tmp_path / expected
    assert (tmp_path / expected).is_dir()


def test_a_cache_on_a_read_only_volume_is_a_mistake_of_the_job_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path], check=False).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(ConfigError, match="Read-only file system; set NEXA_CACHE to a folder where you may write"):
            cache_folder("data")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with made_whole(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_whose_making_failed_never_appears(tmp_path: Path) -> None:
    def fail() -> None:
        with made_whole(tmp_path / "target") as draft:
            (draft / "a").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_fill_one_folder_the_first_to_finish_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with made_whole(target) as slow:
        (slow / "a").write_text("slow")
        with made_whole(target) as fast:
            (fast / "a").write_text("fast")
    assert (target / "a").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from nexa_train.cache import made_whole
with made_whole(Path({str(tmp_path)!r}) / "target") as draft:
    (draft / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    with made_whole(tmp_path / "other"):
        assert left.is_dir()  # It may still be written to.
    old = time.time() - ABANDONED_SECONDS - 60
    os.utime(left, (old, old))
    with made_whole(tmp_path / "another"):
        assert left.is_dir()  # A file in it is young.
    os.utime(left / "a", (old, old))
    with made_whole(tmp_path / "target") as draft:
        (draft / "a").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"target", "other", "another"}


def test_a_discarded_folder_is_gone_and_discarding_again_is_no_error(tmp_path: Path) -> None:
    with made_whole(tmp_path / "target") as draft:
        (draft / "a").write_text("1")
    for _ in range(2):
        discard(tmp_path / "target")
        assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"), made_whole(tmp_path / "target"):
        pass
