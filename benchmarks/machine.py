"""This machine: what it is, what its matrix units give at best, how much memory a process has had."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")

_MATMUL = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
def best(dtype, size=2048, rounds=12):
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        found.append(2 * size**3 / (time.perf_counter() - start))
        if sum(2 * size**3 / rate for rate in found) > 20:
            break
    return max(found)
kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
print(json.dumps({name: best(kinds[name]) for name in sys.argv[2:]}))
"""


def matmul_limit(threads: int, *precisions: str) -> dict[str, float]:
    """FLOP/s of a square product of 2048, the best of several, by number format; in a process of its own.

    Args:
        precisions: fp32, bf16: where a processor has no units for it one product takes a minute.
    """
    command = [sys.executable, "-c", _MATMUL, str(threads), *precisions]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(threads))
    return dict(json.loads(done.stdout))


def environment(threads: int) -> dict[str, str]:
    """The environment of every side: so many threads, and no hub."""
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
    fixed |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}


def peak_bytes(pid: int | str = "self") -> int:
    """The most resident memory that a process has had so far."""
    return _memory(pid, "VmHWM")


def resident_bytes(pid: int | str = "self") -> int:
    """The memory that a process has now."""
    return _memory(pid, "VmRSS")


def _memory(pid: int | str, what: str) -> int:
    """A line of /proc/PID/status (proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {what}")


def facts(threads: int) -> dict[str, Any]:
    """What a result must be read with."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "nexa_train", "operator")),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'unknown')} ({', '.join(units)})"


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True, check=False).stdout.strip()
