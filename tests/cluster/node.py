"""A real node beside a control plane: containerd, kubelet, kube-proxy and CoreDNS, in namespaces of their own.

The node is to this machine what a container is to its host: own processes, mounts, interfaces and iptables rules
(`holder` is its first process), so nodes of several clusters do not meet, and ending one process ends it all. A pair of
virtual interfaces joins it to the control plane's bridge; pods reach this machine at `host_ip`, and this machine
reaches pods.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.control_plane import NODE_NAME, SERVICE_RANGE, ControlPlane, start_control_plane, undone_on_error
from tests.cluster.errors import CommandFailed
from tests.cluster.images import PAUSE_IMAGE, pause_archive
from tests.cluster.ledger import cgroup_folders
from tests.cluster.network import Network, answers, listens
from tests.cluster.paths import HERE
from tests.cluster.process import Process, start
from tests.cluster.run import run
from tests.cluster.tools import binary

_CNI_PROGRAMS = "/usr/lib/cni"
_CONTAINERD = "/run/containerd/containerd.sock"
_DNS_READY_PORT = 8181
_KUBELET_PORT = 10250


@dataclass(frozen=True)
class RealCluster(ControlPlane):
    """A control plane with one node that runs pods."""

    holder_pid: int = field(kw_only=True)

    @property
    def node_name(self) -> str:
        return NODE_NAME

    @property
    def node_ip(self) -> str:
        return self._net.node_ip

    def load_image(self, archive: Path) -> None:
        """Give the node the images of a docker-archive, under the names in it."""
        images = ["ctr", f"--address={_CONTAINERD}", "--namespace=k8s.io", "images"]
        self.on_node([*images, "import", str(archive)])

    def on_node(self, command: Sequence[str | Path], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the node's namespaces."""
        return run([*_enter(self.holder_pid), *command], check=check)

    @property
    def _net(self) -> Network:
        if self.network is None:
            raise CommandFailed("this control plane was started without root: it has no bridge to join a node to")
        return self.network


def start_real_cluster(*, audit: bool = False) -> RealCluster:
    """A control plane and a node, both ready. If anything fails, nothing stays."""
    return add_node(start_control_plane(audit=audit))


def add_node(plane: ControlPlane) -> RealCluster:
    """Join a real node to a control plane; it ends with it."""
    with undone_on_error(plane.ledger):
        pause = pause_archive()
        cluster = RealCluster(**vars(plane), holder_pid=_start_holder(plane))
        _join_network(cluster)
        _start_containerd(cluster)
        cluster.load_image(pause)
        _start_kubelet(cluster)
        _start_proxy(cluster)
        _start_dns(cluster)
        cluster.kubectl("wait", "--for=condition=Ready", "--timeout=120s", f"node/{NODE_NAME}")
        return cluster


def _enter(holder_pid: int) -> list[str]:
    return ["nsenter", f"--target={holder_pid}", "--mount", "--net", "--pid", "--"]


def _start_on_node(cluster: RealCluster, name: str, command: Sequence[str | Path]) -> Process:
    return start(cluster.ledger, name, [*_enter(cluster.holder_pid), *command])


def _node_folder(plane: ControlPlane) -> Path:
    return plane.ledger.folder / "node"


def _start_holder(plane: ControlPlane) -> int:
    """The pid, as this machine sees it, of the first process of the node's namespaces."""
    folder = _node_folder(plane)
    folder.mkdir()
    _make_cgroup(plane)
    namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
    unshare = start(plane.ledger, "node", ["unshare", *namespaces, sys.executable, HERE / "holder.py", folder])
    unshare.wait_until((folder / "ready").exists, timeout_seconds=30, what="namespaces")
    return int(Path(f"/proc/{unshare.id.pid}/task/{unshare.id.pid}/children").read_text().split()[0])


def _cgroup_name(plane: ControlPlane) -> str:
    return plane.ledger.folder.name


def _make_cgroup(plane: ControlPlane) -> None:
    """All pods go below it, apart from whatever else uses cgroups here."""
    plane.ledger.note("cgroup", name=_cgroup_name(plane))
    for folder in cgroup_folders(_cgroup_name(plane)):
        folder.mkdir()


def _join_network(cluster: RealCluster) -> None:
    network = cluster._net
    here = f"{network.interface}n"
    cluster.ledger.note("interface", name=here)
    run(["ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", str(cluster.holder_pid)])
    run(["ip", "link", "set", here, "master", network.interface, "up"])
    cluster.on_node(["ip", "address", "add", f"{network.node_ip}/24", "dev", "eth0"])
    cluster.on_node(["ip", "link", "set", "eth0", "up"])
    cluster.on_node(["ip", "route", "add", "default", "via", network.host_ip])
    run(["ip", "route", "add", str(network.pods), "via", network.node_ip, "dev", network.interface])


def _start_containerd(cluster: RealCluster) -> None:
    folder = _node_folder(cluster)
    _write_cni(folder / "cni", cluster._net)
    config = folder / "containerd.toml"
    config.write_text(_CONTAINERD_CONFIG.format(pause=PAUSE_IMAGE, programs=_CNI_PROGRAMS, networks=folder / "cni"))
    containerd = _start_on_node(cluster, "containerd", ["containerd", f"--config={config}"])
    ctr = ["ctr", f"--address={_CONTAINERD}", "version"]
    containerd.wait_until(
        lambda: cluster.on_node(ctr, check=False).returncode == 0, timeout_seconds=60, what="`ctr version`"
    )


def _write_cni(folder: Path, network: Network) -> None:
    """Routed, not bridged: over a bridge, a Service's answers within the node would bypass kube-proxy's rules."""
    ipam = {"type": "host-local", "ranges": [[{"subnet": str(network.pods)}]], "routes": [{"dst": "0.0.0.0/0"}]}
    plugins = [{"type": "ptp", "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": True}}]
    folder.mkdir()
    config = {"cniVersion": "0.4.0", "name": "nexa", "plugins": plugins}
    (folder / "10-nexa.conflist").write_text(json.dumps(config))


def _start_kubelet(cluster: RealCluster) -> None:
    folder = _node_folder(cluster)
    (folder / "resolv.conf").write_text(f"nameserver {cluster.node_ip}\n")
    config = folder / "kubelet.json"
    config.write_text(json.dumps(_kubelet_config(cluster)))
    command: list[str | Path] = [
        binary("kubelet"),
        f"--kubeconfig={cluster.kubeconfig_of(f'system:node:{NODE_NAME}')}",
        f"--config={config}",
        f"--node-ip={cluster.node_ip}",
        f"--hostname-override={NODE_NAME}",
    ]
    kubelet = _start_on_node(cluster, "kubelet", command)
    serving = lambda: listens(cluster.node_ip, _KUBELET_PORT)  # noqa: E731
    kubelet.wait_until(serving, timeout_seconds=60, what=f"listens on port {_KUBELET_PORT}")


def _kubelet_config(cluster: RealCluster) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": cluster.node_ip,
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(cluster.pki.ca)}},
        "containerRuntimeEndpoint": f"unix://{_CONTAINERD}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{_cgroup_name(cluster)}",
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [cluster.node_ip],
        "clusterDomain": "cluster.local",
        "resolvConf": str(_node_folder(cluster) / "resolv.conf"),
        # A developer's disk is often nearly full; a test must not fail of it.
        "evictionHard": dict.fromkeys(["memory.available", "nodefs.available", "imagefs.available"], "0%"),
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": False,
        "nodeStatusUpdateFrequency": "4s",
    }


def _start_proxy(cluster: RealCluster) -> None:
    config = _node_folder(cluster) / "kube-proxy.json"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "iptables",
                "clientConnection": {"kubeconfig": str(cluster.kubeconfig_of("system:kube-proxy"))},
                "clusterCIDR": str(cluster._net.pods),
                "hostnameOverride": NODE_NAME,
                # Limits of the whole machine, which a node in namespaces may not set.
                "conntrack": {"maxPerCore": 0, "min": 0},
            }
        )
    )
    proxy = _start_on_node(cluster, "kube-proxy", [binary("kube-proxy"), f"--config={config}"])
    first_service = SERVICE_RANGE.replace(".0.0/16", ".0.1")
    proxy.wait_until(
        lambda: first_service in cluster.on_node(["iptables-save", "-t", "nat"]).stdout,
        timeout_seconds=60,
        what=f"iptables rules for {first_service}",
    )


def _start_dns(cluster: RealCluster) -> None:
    corefile = _node_folder(cluster) / "Corefile"
    corefile.write_text(_COREFILE.format(address=cluster.node_ip, port=_DNS_READY_PORT, kubeconfig=cluster.kubeconfig))
    dns = _start_on_node(cluster, "coredns", [binary("coredns"), "-conf", corefile])
    ready = f"http://{cluster.node_ip}:{_DNS_READY_PORT}/ready"
    dns.wait_until(lambda: answers(ready), timeout_seconds=60, what=ready)


# No cache and no time to live: a test asks for a name right before and right after it appears.
_COREFILE = """\
.:53 {{
    bind {address}
    errors
    ready {address}:{port}
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig} nexa
        pods verified
        ttl 0
    }}
}}
"""

# restrict_oom_score_adj: in many containers and virtual machines lowering oom_score_adj is not permitted, and every
# sandbox would fail with "can't get final child's PID from pipe: EOF".
_CONTAINERD_CONFIG = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{programs}"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""
