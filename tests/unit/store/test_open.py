"""Addresses, and what opening a store costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexa_train.artifact.verify import verify
from nexa_train.data.read import read_rows
from nexa_train.errors import ConfigError
from nexa_train.store import open_store


@pytest.mark.parametrize(
    "uri", ["gs://bucket", "http://host/x", "s3://", "s3:///key", "memory://", "file://host/x", "", "ftp://x"]
)
def test_an_address_of_no_supported_kind_lists_those_that_are(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a folder, file:///FOLDER, s3://BUCKET/PREFIX, memory://NAME"):
        open_store(uri)


def test_a_file_uri_and_a_path_open_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    open_store(f"{folder.as_uri()}").create("k", b"x")

    assert open_store(str(folder)).open("k").read() == b"x"


def test_a_relative_path_is_kept_although_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("artifacts")
    monkeypatch.chdir("/")

    assert store.uri == str(tmp_path / "artifacts")


@pytest.mark.parametrize("uri", ["s3://bucket/gsm8k#v2", "s3://bucket/a?versionId=1/b", "s3://buck#et"])
def test_what_s3_cannot_name_is_refused_and_not_dropped(uri: str) -> None:
    odd = "#" if "#" in uri else "?"
    with pytest.raises(ConfigError, match=rf"^s3://.* has '\{odd}'.*leave out '\{odd}"):
        open_store(uri)


@pytest.mark.parametrize("name", ["run#1", "run?1", "100%25 sure", "a;b"])
def test_a_file_uri_names_the_folder_that_it_says(tmp_path: Path, name: str) -> None:
    assert open_store(f"file://{tmp_path}/{name}").uri == f"{tmp_path}/{name.replace('%25', '%')}"
    assert open_store(f"file://localhost{tmp_path}/{name}").uri == f"{tmp_path}/{name.replace('%25', '%')}"


def test_a_name_that_is_no_text_comes_back_from_its_uri(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 #1?")

    assert open_store(folder.as_uri()).uri == str(folder)


NOWHERE = {
    "nobody's home": ("~nobody-of-this-name/x", "has no home here"),
    "a NUL": ("a\0b", "a NUL character"),
    "a NUL in a file URI": ("file:///tmp/%00x", "a NUL character"),
    "a NUL in a bucket": ("s3://bucket/a\0", "a NUL character"),
}


@pytest.mark.parametrize(("uri", "complaint"), NOWHERE.values(), ids=NOWHERE)
def test_what_names_no_place_is_a_wrong_address(uri: str, complaint: str) -> None:
    for call in (open_store, verify):
        with pytest.raises(ConfigError, match=complaint):
            call(uri)
    with pytest.raises(ConfigError, match=complaint):
        read_rows(uri)


def test_one_memory_name_is_one_store() -> None:
    open_store("memory://one").create("k", b"x")

    assert open_store("memory://one").open("k").read() == b"x"
    assert open_store("memory://another").list() == []


def test_a_prefix_that_leaves_the_bucket_is_refused() -> None:
    with pytest.raises(ConfigError):
        open_store("s3://bucket/a/../b")


def test_importing_stores_and_manifests_loads_no_client_and_no_schema_library() -> None:
    program = (
        "import sys, nexa_train.store, nexa_train.artifact.manifest\n"
        "print([name for name in ('obstore', 'stamina', 'pydantic', 'torch') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"
