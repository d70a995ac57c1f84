"""What a cluster leaves on this machine, looked for by the names that only it uses; empty once it is stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.control_plane import ControlPlane
from tests.cluster.ledger import cgroup_folders
from tests.cluster.run import run


@dataclass(frozen=True)
class Footprint:
    """The lists are empty when nothing is left; they are shown in a failed assertion."""

    processes: list[str]
    interfaces: list[str]
    mounts: list[str]
    iptables_rules: list[str]
    folders: list[Path]

    def __bool__(self) -> bool:
        return any(vars(self).values())


def footprint(cluster: ControlPlane) -> Footprint:
    folder = cluster.ledger.folder
    interface = cluster.network.interface if cluster.network else "no interface"
    return Footprint(
        processes=[command for command in _commands() if str(folder) in command],
        interfaces=[name for name in os.listdir("/sys/class/net") if name.startswith(interface)],
        mounts=[line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line],
        iptables_rules=_rules_about(cluster),
        folders=[path for path in (folder, *cgroup_folders(folder.name)) if path.exists()],
    )


def _rules_about(cluster: ControlPlane) -> list[str]:
    """kube-proxy's rules name chains KUBE-..., CNI's name CNI-...; neither may reach this machine's own tables."""
    if cluster.network is None:
        return []
    ours = cluster.network.interface, str(cluster.network.subnet[0]).rpartition(".")[0] + "."
    saved = run(["iptables-save"], check=False).stdout.splitlines()
    return [rule for rule in saved if any(name in rule for name in ours)]


def _commands() -> list[str]:
    """A program that was given the folder in its command line is the cluster's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended while we looked
    return found
