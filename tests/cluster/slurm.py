"""A Slurm of one's own: munged, slurmctld and two slurmd, each node a machine to the others.

Comes after `network` and `ledger`, needs no Kubernetes. A node has its own hostname, address, ports, processes and
/etc/hosts (namespaces held by one process), as on a real cluster, where names of nodes resolve on every node. Nothing
of the system's Slurm is read or touched: all programs are told of this one by SLURM_CONF.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.control_plane import undone_on_error
from tests.cluster.ledger import Ledger
from tests.cluster.network import Network, free_ports, listens, make_network
from tests.cluster.process import Process, start
from tests.cluster.run import run, wait_until

NODES = ("n1", "n2")
_CONTROLLER = "ctl"
_SLURMD_PORT = 6818
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class JobState:
    """What `scontrol` says of a job."""

    name: str
    exit_code: int
    signal: int
    restarts: int

    @property
    def ended(self) -> bool:
        return self.name in _ENDED


@dataclass(frozen=True)
class Slurm:
    """A running one."""

    ledger: Ledger
    network: Network

    @property
    def env(self) -> dict[str, str]:
        """Leads Slurm's programs here."""
        return {"SLURM_CONF": str(self.ledger.folder / "slurm.conf")}

    def run(
        self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command of a user of this Slurm."""
        return run(command, env={**self.env, **(env or {})}, cwd=cwd, check=check, timeout_seconds=60)

    def job(self, number: str) -> JobState:
        shown = self.run("scontrol", "show", "--oneliner", "job", number).stdout
        facts = dict(re.findall(r"(\w+)=(\S*)", shown))
        status, _, signal = facts["ExitCode"].partition(":")
        return JobState(facts["JobState"], int(status), int(signal), int(facts["Restarts"]))

    def wait_ended(self, number: str, *, timeout_seconds: float = 180) -> JobState:
        """Wait until nothing more will happen to the job, and every process of it is gone."""

        def ended() -> JobState | None:
            state = self.job(number)
            return state if state.ended else None

        return wait_until(ended, timeout_seconds=timeout_seconds, what=f"Slurm job {number} has ended")

    def wait_idle(self) -> None:
        """Wait until no node has anything left of a job."""

        def idle() -> bool:
            return set(self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()) == {"idle"}

        wait_until(idle, timeout_seconds=90, what="both nodes are idle")

    def stop(self) -> None:
        """End it, its jobs and its nodes, and leave nothing behind."""
        self.ledger.undo()


def start_slurm() -> Slurm:
    """Start one and wait until both nodes take jobs. If anything fails, nothing stays."""
    ledger = Ledger.open()
    with undone_on_error(ledger):
        slurm = Slurm(ledger, make_network(ledger))
        _write_files(slurm)
        _start_munged(ledger)
        _start_controller(slurm)
        for node in NODES:
            _start_node(slurm, node)
        slurm.wait_idle()
        return slurm


def _address(network: Network, node: str) -> str:
    """The first is this machine, then come the nodes."""
    return str(network.subnet[2 + NODES.index(node)])


def _write_files(slurm: Slurm) -> None:
    folder, network = slurm.ledger.folder, slurm.network
    (folder / "state").mkdir()
    (folder / "cgroup.conf").touch()
    port = free_ports(1, network.host_ip)[0]
    config = _CONFIG.format(folder=folder, address=network.host_ip, port=port, slurmd_port=_SLURMD_PORT, **_machine())
    (folder / "slurm.conf").write_text(config)
    names = {"localhost": "127.0.0.1", _CONTROLLER: network.host_ip}
    names |= {node: _address(network, node) for node in NODES}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))


def _machine() -> dict[str, int]:
    """What each node has: both have all of this machine, and the kernel shares it out."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"num_cpus": os.cpu_count() or 1, "megabytes": total >> 20}


def _start_munged(ledger: Ledger) -> None:
    folder = ledger.folder
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    own = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
    own |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
    # By force: it warns of a folder that other users cannot enter, and there are none.
    command = ["/usr/sbin/munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in own.items())]
    munged = start(ledger, "munged", command)
    munged.wait_until((folder / "munge.socket").exists, timeout_seconds=30, what="its socket")


def _start_controller(slurm: Slurm) -> None:
    """In this machine's network, but where the names of the nodes resolve."""
    script = f"{_in_the_cluster(slurm, _CONTROLLER)} && exec /usr/sbin/slurmctld -D -c"
    namespaces = ["--mount", "--uts", "--propagation=private"]
    controller = start(slurm.ledger, "slurmctld", ["unshare", *namespaces, "sh", "-c", script], env=slurm.env)
    up = lambda: slurm.run("scontrol", "ping", check=False).returncode == 0  # noqa: E731
    controller.wait_until(up, timeout_seconds=60, what="`scontrol ping`")


def _start_node(slurm: Slurm, node: str) -> None:
    holder_pid = _start_holder(slurm, node)
    enter = ["nsenter", f"--target={holder_pid}", "--mount", "--uts", "--net", "--pid", "--"]
    _join_network(slurm, node, holder_pid, enter)
    slurmd: Process = start(slurm.ledger, f"slurmd-{node}", [*enter, "/usr/sbin/slurmd", "-D"], env=slurm.env)
    serving = lambda: listens(_address(slurm.network, node), _SLURMD_PORT)  # noqa: E731
    slurmd.wait_until(serving, timeout_seconds=60, what=f"listens on port {_SLURMD_PORT}")


def _start_holder(slurm: Slurm, node: str) -> int:
    """The first process of the node, which buries orphans; when it dies, the kernel ends all of the node."""
    ready = slurm.ledger.folder / f"{node}.ready"
    script = f"{_in_the_cluster(slurm, node)} && ip link set lo up && touch {shlex.quote(str(ready))}"
    namespaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["unshare", *namespaces, "--propagation=private", "bash", "-c", f"{script} && sleep infinity & wait"]
    unshare = start(slurm.ledger, node, command)
    unshare.wait_until(ready.exists, timeout_seconds=30, what="namespaces")
    return int(Path(f"/proc/{unshare.id.pid}/task/{unshare.id.pid}/children").read_text().split()[0])


def _in_the_cluster(slurm: Slurm, name: str) -> str:
    """Shell: within namespaces of one's own, be a machine of this name that knows the others' names."""
    hosts = shlex.quote(str(slurm.ledger.folder / "hosts"))
    return f"hostname {name} && mount --bind {hosts} /etc/hosts"


def _join_network(slurm: Slurm, node: str, holder_pid: int, enter: Sequence[str]) -> None:
    network, here = slurm.network, f"{slurm.network.interface}{node}"
    slurm.ledger.note("interface", name=here)
    run(["ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", str(holder_pid)])
    run(["ip", "link", "set", here, "master", network.interface, "up"])
    run([*enter, "ip", "address", "add", f"{_address(network, node)}/24", "dev", "eth0"])
    run([*enter, "ip", "link", "set", "eth0", "up"])


# Defaults of Slurm where they matter to a job: KillWait, requeueing, a fresh log after one.
_CONFIG = """\
ClusterName=nexa
SlurmctldHost=ctl({address})
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
NodeName=n[1-2] CPUs={num_cpus} RealMemory={megabytes} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=100
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
