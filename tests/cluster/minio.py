"""A MinIO server of one's own: for the contract tests of the S3 store alone, and for pods beside a cluster."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from minio import Minio
from minio.commonconfig import ENABLED
from minio.versioningconfig import VersioningConfig

from tests.cluster.control_plane import undone_on_error
from tests.cluster.ledger import Ledger
from tests.cluster.network import answers, free_ports
from tests.cluster.process import Process, start
from tests.cluster.tools import binary

_REGION = "us-east-1"


@dataclass(kw_only=True)
class MinioServer:
    """Its data outlives `stop`, so that a test can take the store away and give it back on the same address."""

    address: str
    port: int
    access_key: str
    secret_key: str = field(repr=False)
    ledger: Ledger
    _process: Process | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @cached_property
    def client(self) -> Minio:
        return Minio(
            f"{self.address}:{self.port}",
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=False,
            region=_REGION,
        )

    def make_bucket(self, name: str | None = None, versioning: bool = True) -> str:
        name = name or f"bucket-{secrets.token_hex(4)}"
        self.client.make_bucket(name)
        if versioning:
            self.client.set_bucket_versioning(name, VersioningConfig(ENABLED))
        return name

    def env(self) -> dict[str, str]:
        """What an S3 client reads from its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": _REGION,
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        """Returns when it serves; does nothing if it does already."""
        if self._process and self._process.id.alive:
            return
        command: list[str | Path] = [binary("minio"), "server", "--address", f"{self.address}:{self.port}"]
        command += ["--console-address", "127.0.0.1:0", "--anonymous", self.ledger.folder / "minio"]
        env = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key, **_QUIET}
        self._process = start(self.ledger, "minio", command, env=env)
        ready = f"{self.endpoint}/minio/health/cluster"
        self._process.wait_until(lambda: answers(ready), timeout_seconds=60, what=ready)

    def stop(self) -> None:
        if self._process:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """At once, as a machine dies."""
        if self._process:
            self._process.id.end()
            self._process = None

    def close(self) -> None:
        """Stop it and remove its data. Where it shares a cluster's ledger, the cluster's `stop` does this."""
        self.ledger.undo()


def start_minio(*, address: str = "127.0.0.1", ledger: Ledger | None = None) -> MinioServer:
    """A server with credentials of its own; with a cluster's ledger it ends with the cluster."""
    own = ledger or Ledger.open()
    server = MinioServer(
        address=address,
        port=free_ports(1, address)[0],
        access_key=f"nexa{secrets.token_hex(6)}",
        secret_key=secrets.token_hex(20),
        ledger=own,
    )
    with undone_on_error(own):
        server.start()
    return server


# It would look for updates and open a browser console.
_QUIET = {"MINIO_UPDATE": "off", "MINIO_BROWSER": "off"}
