"""What code and what machine a run used, for the manifest."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from nexa_train.config.protocol import ENV_IMAGE

PACKAGES = ("nexa-train", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def code_facts() -> dict[str, Any]:
    """Revision and uncommitted changes of a checkout, package versions, Python, image."""
    return {
        "revision": _git("rev-parse", "HEAD"),
        "dirty_diff_sha256": _dirty(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "image": os.environ.get(ENV_IMAGE),
    }


def processor() -> str:
    """The kind of processor: bits are promised to be the same on the same kind only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dirty() -> str | None:
    diff = _git("diff", "HEAD")
    return hashlib.sha256(diff.encode()).hexdigest() if diff else None


def _git(*arguments: str) -> str | None:
    """Of the checkout that this package stands in; None where it is installed without one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
