"""Addresses, and what opening a store costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
