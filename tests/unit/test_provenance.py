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


def test_what_a_checkout_has_beside_its_revision_is_told_in_any_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    def dirty() -> object:
        return code_facts()["dirty_diff_sha256"]

    package = tmp_path / "nexa_train"
    package.mkdir()
    (package / "code.py").write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("commit", "--message=first")
    monkeypatch.setattr(provenance, "_PACKAGE", package)
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
