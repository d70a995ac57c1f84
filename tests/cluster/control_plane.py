"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler on this machine, with kwok's fake nodes on request.

Comes after `tools`, `pki` and `network`; `node` adds a node that runs real pods. As root the API server listens on a
bridge of its own, which pods reach; without root on loopback, which is enough for fake nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.cluster.cluster import Cluster, PodsThere, write_kubeconfig
from tests.cluster.errors import Unavailable
from tests.cluster.ledger import Ledger, ProcessId
from tests.cluster.network import Network, answers, free_ports, make_network
from tests.cluster.pki import Pki, make_pki, write_tokens
from tests.cluster.process import Process, start
from tests.cluster.run import wait_until
from tests.cluster.tools import binary, module_files

NODE_NAME = "nexa-node"
SERVICE_RANGE = "10.96.0.0/16"
_FIRST_SERVICE = "10.96.0.1"
_LOOPBACK = "127.0.0.1"
_COMPLETE = "pod-complete"
"""The stage of kwok's that ends pods."""
_LEFT_OUT: dict[PodsThere, tuple[str, ...]] = {
    "end": (),
    "run": (_COMPLETE,),
    "wait": (_COMPLETE, "pod-delete", "pod-ready"),
}
"""Of kwok's stages, all of which that do anything to pods are in the last."""

# The default limits (20 and 50 requests a second) would hide everything else in a load test.
_CLIENT_LIMITS = ("--kube-api-qps=5000", "--kube-api-burst=10000")

# Static tokens: user -> group. `admin` is what tests use.
_USERS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    f"system:node:{NODE_NAME}": "system:nodes",
}
NODE_GRACE_SECONDS = 40
"""How long a node may be silent. As before 1.32; it is 50 now."""

_AUDIT_POLICY = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}


@dataclass(frozen=True)
class ControlPlane(Cluster):
    """A control plane that this process started."""

    ledger: Ledger = field(kw_only=True)
    network: Network | None = field(kw_only=True)
    pki: Pki = field(kw_only=True)
    tokens: dict[str, str] = field(kw_only=True, repr=False)

    @property
    def host_ip(self) -> str:
        if self.network is None:
            raise Unavailable("without root the API server listens on loopback, where no pod reaches it")
        return self.network.host_ip

    def fake_nodes(
        self, num_nodes: int, *, tainted: bool = True, keeper: str = "fake", pods: PodsThere = "end"
    ) -> list[str]:
        """Have `KEEPER-0` to `KEEPER-N`, Ready, with eight GPUs each, kept by a kwok of their own.

        Pods that `wait` there have the test for their kubelet.
        Tainted with `kwok.x-k8s.io/node=KEEPER:NoSchedule`, so that only pods land there that ask for it.
        """
        self._start_kwok_once(keeper, _LEFT_OUT[pods])
        names = [f"{keeper}-{index}" for index in range(num_nodes)]
        items = [_fake_node(name, keeper, tainted=tainted) for name in names]
        nodes = {"apiVersion": "v1", "kind": "List", "items": items}
        self.kubectl("apply", "--filename=-", input=json.dumps(nodes))
        self.kubectl("wait", "--for=condition=Ready", "--timeout=60s", *(f"node/{name}" for name in names))
        return names

    def kubeconfig_of(self, user: str) -> Path:
        file = self.ledger.folder / f"{user.replace(':', '-')}.kubeconfig"
        return write_kubeconfig(file, server=self.server, ca=self.pki.ca, token=self.tokens[user])

    def processes(self) -> list[ProcessId]:
        return list(self.ledger.processes())

    def stop(self) -> None:
        """End it and everything that was added to it, and leave nothing behind."""
        self.ledger.undo()

    def signal_keeper(self, keeper: str, number: int) -> None:
        """Stopped, it lets its nodes fall silent; continued, they are back."""
        (pid,) = (entry["pid"] for entry in self.ledger.entries("process") if entry["name"] == f"kwok-{keeper}")
        os.kill(int(pid), number)

    def _start_kwok_once(self, keeper: str, left_out: Collection[str]) -> None:
        if any(entry["name"] == f"kwok-{keeper}" for entry in self.ledger.entries("process")):
            return
        stages = [_stage(self.ledger, file) for file in module_files("kwok") if file.stem not in left_out]
        port = free_ports(1)[0]
        kwok = start(
            self.ledger,
            f"kwok-{keeper}",
            [
                binary("kwok"),
                f"--kubeconfig={self.kubeconfig}",
                "--manage-all-nodes=false",
                f"--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node={keeper}",
                f"--server-address={_LOOPBACK}:{port}",
                *(f"--config={stage}" for stage in stages),
            ],
        )
        kwok.wait_until(lambda: answers(f"http://{_LOOPBACK}:{port}/healthz"), timeout_seconds=60, what="healthy")


def _stage(ledger: Ledger, shipped: Path) -> Path:
    """As kwok ships it, but for the one that ends pods: that knows of Jobs alone."""
    if shipped.stem != _COMPLETE:
        return shipped
    stage = yaml.safe_load(shipped.read_text())
    (owners,) = (each for each in stage["spec"]["selector"]["matchExpressions"] if each.get("values") == ["Job"])
    owners["values"].append("PyTorchJob")
    changed = ledger.folder / shipped.name
    changed.write_text(json.dumps(stage))
    return changed


def start_control_plane(*, audit: bool = False) -> ControlPlane:
    """Start one and wait until a pod could be created in it. If anything fails, nothing stays."""
    ledger = Ledger.open()
    with undone_on_error(ledger):
        network = make_network(ledger) if os.geteuid() == 0 else None
        address = network.host_ip if network else _LOOPBACK
        pki = make_pki(ledger.folder / "pki", server_addresses=[_LOOPBACK, _FIRST_SERVICE, address])
        tokens = write_tokens(pki.folder / "tokens.csv", _USERS)
        audit_log = ledger.folder / "audit.log" if audit else None
        port = free_ports(1, address)[0]
        server = f"https://{address}:{port}"
        kubeconfig = write_kubeconfig(ledger.folder / "kubeconfig", server=server, ca=pki.ca, token=tokens["admin"])
        plane = ControlPlane(
            kubeconfig, server, tokens["admin"], audit_log, ledger=ledger, network=network, pki=pki, tokens=tokens
        )
        _start_programs(plane, address, port)
        return plane


@contextmanager
def undone_on_error(ledger: Ledger) -> Iterator[None]:
    """Also on Ctrl-C: half a cluster is of no use to anyone."""
    try:
        yield
    except BaseException:
        ledger.undo()
        raise


def _start_programs(plane: ControlPlane, address: str, port: int) -> None:
    etcd_url = _start_etcd(plane.ledger)
    api_server = start(plane.ledger, "kube-apiserver", _api_server_command(plane, etcd_url, address, port))
    ready = lambda: plane.kubectl("get", "--raw=/readyz", check=False).returncode == 0  # noqa: E731
    api_server.wait_until(ready, timeout_seconds=120, what="/readyz")
    _start_controllers(plane)
    wait_until(
        lambda: plane.kubectl("get", "serviceaccount", "default", check=False).returncode == 0,
        timeout_seconds=60,
        what="service account default/default exists, without which no pod can be created",
    )


def _start_etcd(ledger: Ledger) -> str:
    client, peer = (f"http://{_LOOPBACK}:{port}" for port in free_ports(2))
    command: list[str | Path] = [
        binary("etcd"),
        "--name=nexa",
        f"--data-dir={ledger.folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=nexa={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]
    etcd = start(ledger, "etcd", command)
    etcd.wait_until(lambda: answers(f"{client}/health"), timeout_seconds=60, what="/health")
    return client


def _api_server_command(plane: ControlPlane, etcd_url: str, address: str, port: int) -> list[str | Path]:
    pki, folder = plane.pki, plane.ledger.folder
    return [
        binary("kube-apiserver"),
        f"--etcd-servers={etcd_url}",
        f"--bind-address={address}",
        f"--advertise-address={address}",
        f"--secure-port={port}",
        f"--cert-dir={folder}",
        f"--tls-cert-file={pki.certificate('apiserver')}",
        f"--tls-private-key-file={pki.key('apiserver')}",
        f"--client-ca-file={pki.ca}",
        f"--token-auth-file={pki.folder / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki.folder / 'service-account.pub'}",
        f"--service-account-signing-key-file={pki.key('service-account')}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--kubelet-client-certificate={pki.certificate('kubelet-client')}",
        f"--kubelet-client-key={pki.key('kubelet-client')}",
        "--kubelet-preferred-address-types=InternalIP",
        "--allow-privileged=true",
        *_audit_flags(plane),
    ]


def _audit_flags(plane: ControlPlane) -> list[str]:
    if plane.audit_log is None:
        return []
    policy = plane.ledger.folder / "audit-policy.json"
    policy.write_text(json.dumps(_AUDIT_POLICY))
    return [f"--audit-policy-file={policy}", f"--audit-log-path={plane.audit_log}"]


def _start_controllers(plane: ControlPlane) -> None:
    manager_port, scheduler_port = free_ports(2)
    manager = _start_client(
        plane,
        "kube-controller-manager",
        manager_port,
        f"--root-ca-file={plane.pki.ca}",
        f"--service-account-private-key-file={plane.pki.key('service-account')}",
        f"--cluster-signing-cert-file={plane.pki.ca}",
        f"--cluster-signing-key-file={plane.pki.ca_key}",
        "--use-service-account-credentials=true",
        "--concurrent-job-syncs=20",
        f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
    )
    scheduler = _start_client(plane, "kube-scheduler", scheduler_port)
    for process, port in ((manager, manager_port), (scheduler, scheduler_port)):
        process.wait_until(
            lambda port=port: answers(f"https://{_LOOPBACK}:{port}/healthz"),  # type: ignore[misc]
            timeout_seconds=60,
            what="/healthz",
        )


def _start_client(plane: ControlPlane, program: str, port: int, *flags: str) -> Process:
    kubeconfig = plane.kubeconfig_of(f"system:{program}")
    where = (f"--kubeconfig={kubeconfig}", f"--bind-address={_LOOPBACK}", f"--secure-port={port}")
    return start(plane.ledger, program, [binary(program), *where, "--leader-elect=false", *_CLIENT_LIMITS, *flags])


def _fake_node(name: str, keeper: str, *, tainted: bool) -> dict[str, object]:
    resources = {"cpu": "64", "memory": "512Gi", "pods": "256", "nvidia.com/gpu": "8", "example.com/hca": "2"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": keeper, "node.alpha.kubernetes.io/ttl": "0"},
            "labels": {"type": "kwok", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
        },
        "spec": {"taints": [{"key": "kwok.x-k8s.io/node", "value": keeper, "effect": "NoSchedule"}] if tainted else []},
        "status": {"allocatable": resources, "capacity": resources},
    }
