"""What this machine can give, and the Debian packages that a node, images and Slurm need.

What cannot be given is refused with `Unavailable` and a reason of one line, which a skipped test shows.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.errors import Unavailable
from tests.cluster.run import run

# Debian package -> a file it brings, looked for on the PATH if it is a bare name.
_CONTROL_PLANE_PACKAGES = {"openssl": "openssl", "iproute2": "ip"}
_NODE_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "conntrack": "conntrack",
    "iptables": "iptables",
    "util-linux": "nsenter",
}
_IMAGE_PACKAGES = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "busybox-static": "/bin/busybox",
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
}
_SLURM_PACKAGES = {
    "iproute2": "ip",
    "munge": "munged",
    "slurm-wlm": "slurmctld",
    "slurmd": "slurmd",
    "slurm-client": "sbatch",
    "util-linux": "nsenter",
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def require_control_plane() -> None:
    """Raise `Unavailable` with the reason if no control plane can run here."""
    _require(_reason_against_linux(), _CONTROL_PLANE_PACKAGES)


def require_node() -> None:
    """Raise `Unavailable` with the reason if no real node can run here; installs what is missing where it may."""
    reason = _reason_against_linux() or _reason_against_user() or _reason_against_kernel()
    _require(reason, {**_CONTROL_PLANE_PACKAGES, **_NODE_PACKAGES, **_IMAGE_PACKAGES})
    probe = "ip link add nexaprobe type veth peer name nexapeer && iptables -t nat -L"
    # Asked last: the probe uses the packages.
    if reason := _reason_against_namespaces("a real node needs namespaces, veth and iptables", probe):
        raise Unavailable(reason)


def require_image_tools() -> None:
    """Raise `Unavailable` with the reason if images cannot be built here; installs what is missing where it may."""
    _require(_reason_against_linux() or _reason_against_user(), _IMAGE_PACKAGES)


def require_slurm() -> None:
    """Raise `Unavailable` with the reason if no Slurm can run here; installs what is missing where it may."""
    if platform.system() != "Linux":
        raise Unavailable(f"a Slurm of our own needs Linux, this is {platform.system()}")
    _require(None if os.geteuid() == 0 else "a Slurm of our own needs root: run as root", _SLURM_PACKAGES)
    probe = "hostname nexaprobe && ip link add nexaprobe type veth peer name nexapeer"
    if reason := _reason_against_namespaces("Slurm's nodes need namespaces and veth", probe, "--uts"):
        raise Unavailable(reason)


def _reason_against_linux() -> str | None:
    if platform.system() == "Linux":
        return None
    return f"a control plane of our own needs Linux, this is {platform.system()}: set NEXA_TEST_KUBECONFIG"


def _reason_against_user() -> str | None:
    return None if os.geteuid() == 0 else "a real node needs root: run as root or set NEXA_TEST_KUBECONFIG"


def _reason_against_kernel() -> str | None:
    filesystems = Path("/proc/filesystems").read_text().split()
    if "overlay" not in filesystems and shutil.which("modprobe", path=_SYSTEM_PATH):
        run(["modprobe", "overlay"], check=False)
        filesystems = Path("/proc/filesystems").read_text().split()
    if "overlay" not in filesystems:
        return "a real node needs overlayfs, and this kernel has none (/proc/filesystems)"
    if "cgroup" not in Path("/proc/mounts").read_text():
        return "a real node needs cgroups, and none are mounted (/proc/mounts)"
    return None


def _reason_against_namespaces(need: str, probe: str, *more: str) -> str | None:
    """A container without CAP_SYS_ADMIN looks like root and can do none of this."""
    done = run(["unshare", "--mount", "--net", "--pid", *more, "--fork", "sh", "-c", probe], check=False)
    said = done.stderr.strip().splitlines()
    return f"{need}: {said[-1]}" if done.returncode and said else None


def _require(reason: str | None, packages: dict[str, str]) -> None:
    if reason:
        raise Unavailable(reason)
    _install([package for package, brings in packages.items() if not _present(brings)])


def _present(file: str) -> bool:
    return Path(file).exists() if file.startswith("/") else shutil.which(file, path=_SYSTEM_PATH) is not None


def _install(packages: list[str]) -> None:
    if not packages:
        return
    wanted = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(f"packages are missing: {wanted}; as root: apt-get install {wanted}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "--quiet"], env=env)
    with _services_stay_off():
        run(["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages], env=env)


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """Debian starts a service once it is installed unless this file says no; tests start programs of their own."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
