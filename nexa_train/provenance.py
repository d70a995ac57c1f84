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

PACKAGES = (
    "nexa-train", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed", "axolotl",
    "safetensors", "tokenizers", "numpy",
)  # fmt: skip
"""What decides weights, or how they are written."""

CPUINFO = Path("/proc/cpuinfo")


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
    return _cpuinfo("model name") or platform.machine()


def has_bf16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (x86: AVX512-BF16 or AMX; Arm: BF16).

    Others take hundreds of times as long for them as for float32.
    """
    flags = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return not {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}.isdisjoint(flags)


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor; empty where it says nothing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), ""
    )


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
