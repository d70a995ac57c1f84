"""What a manifest says of the code that made a checkpoint."""

from __future__ import annotations

from importlib.metadata import version

from nexa_train.provenance import code_facts


def test_every_library_that_decides_weights_is_named_with_its_version() -> None:
    named = code_facts()["packages"]
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed"):
        assert named[package] == version(package)
