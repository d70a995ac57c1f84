"""What every cluster offers to a test, whoever started it; and how a kubeconfig is written."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tests.cluster.errors import Unavailable
from tests.cluster.run import run
from tests.cluster.tools import binary

PodsThere: TypeAlias = Literal["end", "run", "wait"]
"""What becomes of pods on a fake node: Jobs' complete; they run until they are deleted; nobody looks after them."""


@dataclass(frozen=True)
class Cluster:
    """An API server and the rights of its administrator."""

    kubeconfig: Path
    server: str
    token: str
    audit_log: Path | None = None

    def kubectl(self, *args: str, input: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run([binary("kubectl"), f"--kubeconfig={self.kubeconfig}", *args], input=input, check=check)

    def fake_nodes(
        self, num_nodes: int, *, tainted: bool = True, keeper: str = "fake", pods: PodsThere = "end"
    ) -> list[str]:
        raise Unavailable("fake nodes are made only in a cluster that the tests start; unset NEXA_TEST_KUBECONFIG")

    @property
    def host_ip(self) -> str:
        """An address of this machine that pods reach."""
        if address := os.environ.get("NEXA_TEST_HOST_IP"):
            return address
        raise Unavailable("set NEXA_TEST_HOST_IP to an address of this machine that the cluster's pods reach")


@dataclass(frozen=True)
class ExternalCluster(Cluster):
    """The developer's own cluster, named by `NEXA_TEST_KUBECONFIG`; nothing of it is started or stopped here."""

    @classmethod
    def from_environment(cls) -> ExternalCluster | None:
        file = os.environ.get("NEXA_TEST_KUBECONFIG")
        return cls.of(Path(file)) if file else None

    @classmethod
    def of(cls, kubeconfig: Path) -> ExternalCluster:
        seen = cls(kubeconfig, "", "").kubectl("config", "view", "--raw", "--minify", "--output=json")
        config = json.loads(seen.stdout)
        user = config["users"][0]["user"] if config.get("users") else {}
        return cls(kubeconfig, config["clusters"][0]["cluster"]["server"], user.get("token", ""))

    @property
    def node_name(self) -> str:
        return self.kubectl("get", "nodes", "--output=jsonpath={.items[0].metadata.name}").stdout

    @property
    def node_ip(self) -> str:
        path = '{.items[0].status.addresses[?(@.type=="InternalIP")].address}'
        return self.kubectl("get", "nodes", f"--output=jsonpath={path}").stdout

    def load_image(self, archive: Path) -> None:
        """By the command in `NEXA_TEST_IMAGE_LOAD`, such as `kind load image-archive`."""
        command = os.environ.get("NEXA_TEST_IMAGE_LOAD")
        if not command:
            raise Unavailable("set NEXA_TEST_IMAGE_LOAD to what loads an archive, such as `kind load image-archive`")
        run([*shlex.split(command), archive])


def write_kubeconfig(file: Path, *, server: str, ca: Path, token: str) -> Path:
    """With everything inside, so that the file can be copied anywhere (JSON is YAML)."""
    authority = base64.b64encode(ca.read_bytes()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "nexa", "cluster": {"server": server, "certificate-authority-data": authority}}],
        "users": [{"name": "nexa", "user": {"token": token}}],
        "contexts": [{"name": "nexa", "context": {"cluster": "nexa", "user": "nexa"}}],
        "current-context": "nexa",
    }
    file.touch(mode=0o600)
    file.write_text(json.dumps(config, indent=2))
    return file
