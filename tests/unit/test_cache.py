"""What is kept between runs: in one place, and whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexa_train.cache import cache_folder, made_whole


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


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"), made_whole(tmp_path / "target"):
        pass
