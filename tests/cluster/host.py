"""What this machine can give, and the Debian packages that a node and images need.

What cannot be given is refused with `Unavailable` and a reason of one line, which a skipped test shows.
"""

from __future__ import annotations

import os
import platform
import shutil
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
_SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def require_control_plane() -> None:
    """Raise `Unavailable` with the reason if no control plane can run here."""
    _require(_reason_against_linux(), _CONTROL_PLANE_PACKAGES)


def require_node() -> None:
    """Raise `Unavailable` with the reason if no real node can run here; installs what is missing where it may."""
    reason = _reason_against_linux() or _reason_against_user() or _reason_against_kernel()
    _require(reason, {**_CONTROL_PLANE_PACKAGES, **_NODE_PACKAGES, **_IMAGE_PACKAGES})
    if reason := _reason_against_namespaces():  # asked last: the probe uses the packages
        raise Unavailable(reason)


def require_image_tools() -> None:
    """Raise `Unavailable` with the reason if images cannot be built here; installs what is missing where it may."""
    _require(_reason_against_linux() or _reason_against_user(), _IMAGE_PACKAGES)


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


def _reason_against_namespaces() -> str | None:
    """A container without CAP_SYS_ADMIN looks like root and can do none of this."""
    probe = "ip link add nexaprobe type veth peer name nexapeer && iptables -t nat -L"
    done = run(["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", probe], check=False)
    said = done.stderr.strip().splitlines()
    return f"a real node needs namespaces, veth and iptables: {said[-1]}" if done.returncode and said else None


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
    run(["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages], env=env)
