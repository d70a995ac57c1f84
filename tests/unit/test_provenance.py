"""What a manifest says of the code that made a checkpoint."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from nexa_train import provenance
from nexa_train.provenance import code_facts


def test_every_library_that_decides_weights_is_named_with_its_version() -> None:
    named = code_facts()["packages"]
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed"):
        assert named[package] == version(package)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def dirty() -> object:
    return code_facts()["dirty_diff_sha256"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code in a checkout, all of it committed."""
    package = tmp_path / "nexa_train"
    package.mkdir()
    (package / "code.py").write_text("a = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message=first")
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    return package


def test_what_a_checkout_has_beside_its_revision_is_told_in_any_encoding(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (len(code_facts()["revision"]), dirty()) == (40, None)
    (package / "new.py").write_text("b = 1\n")
    first = dirty()
    (package / "new.py").write_text("b = 2\n")
    second = dirty()
    (tmp_path / "notes.txt").write_text("of nobody's concern")
    assert len({None, first, second, dirty()}) == 3
    (package / "code.py").write_bytes("a = 'é'\n".encode("latin-1"))
    assert dirty() not in (None, second)
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "nowhere/nexa_train")
    assert (code_facts()["revision"], dirty()) == (None, None)


def test_another_repository_in_the_environment_is_not_asked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_facts()["revision"]
    git(tmp_path, "init", "other")
    for name, value in {"GIT_DIR": ".git", "GIT_WORK_TREE": ".", "GIT_INDEX_FILE": ".git/index"}.items():
        monkeypatch.setenv(name, str(tmp_path / "other" / value))
    assert (before and len(before), code_facts()["revision"], dirty()) == (40, before, None)


def test_how_somebody_likes_to_see_differences_changes_no_digest(package: Path, tmp_path: Path) -> None:
    (package / "code.py").write_text("a = 2\n")
    plain = dirty()
    (tmp_path / ".git" / "info" / "attributes").write_text("*.py diff=mine\n")
    likes = {"diff.external": "echo", "diff.mine.textconv": "wc", "diff.noprefix": "true", "color.ui": "always"}
    for key, value in likes.items():
        git(tmp_path, "config", key, value)
        assert dirty() == plain, key
    git(tmp_path, "config", "--unset", "diff.noprefix")
    git(tmp_path, "config", "diff.mnemonicPrefix", "true")
    assert dirty() == plain
