"""What code and what machine a run used, for the manifest."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from contextlib import suppress
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
_PACKAGE = Path(__file__).parent
_NOT_OURS = re.compile(r"GIT_(?!CONFIG_)")
_AS_IT_IS = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
"""However the person at the keyboard likes to see differences."""


def code_facts() -> dict[str, Any]:
    """Revision and uncommitted changes of a checkout, package versions, Python, image."""
    return {
        "revision": _git("rev-parse", "HEAD").decode() or None,
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
    """SHA-256 of what the revision does not hold: the difference of its files, and files of the package that git does
    not know; None: nothing."""
    diff = _git("diff", *_AS_IT_IS, "HEAD")
    unknown = _git("ls-files", "-z", "--others", "--exclude-standard", "--", _PACKAGE.name)
    if not diff and not unknown:
        return None
    sha = hashlib.sha256(diff)
    for name in filter(None, unknown.split(b"\0")):
        with suppress(OSError):  # gone since, or a link that leads nowhere
            content = (_PACKAGE.parent / os.fsdecode(name)).read_bytes()
            sha.update(b"\0" + name + b"\0" + hashlib.sha256(content).digest())
    return sha.hexdigest()


def _git(*arguments: str) -> bytes:
    """Of the checkout that this package stands in, as it is: a file may be in any encoding. Nothing where it is
    installed without one."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return b""
    # Hooks and other tools that call us name their own repository there. Settings stay: by one of them git may be told
    # that somebody else's checkout is safe to read.
    environment = {name: os.environ[name] for name in os.environ if not _NOT_OURS.match(name)}
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, env=environment).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return b""
