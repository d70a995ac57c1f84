"""The API server by plain HTTP: a test that asks a hundred times a second cannot start a kubectl for each."""

from __future__ import annotations

import base64
import json
import ssl
from typing import Any

import httpx

from tests.cluster.cluster import Cluster
from tests.cluster.errors import CommandFailed, Unavailable

Object = dict[str, Any]

_TIMEOUT_SECONDS = 30


class Refused(CommandFailed):
    """The API server said no; polling goes on."""

    def __init__(self, asked: str, status: int, message: str) -> None:
        super().__init__(f"{asked}: {status}: {message}")
        self.status, self.message = status, message


class Api:
    """As the cluster's administrator or whom he impersonates, from any number of threads."""

    def __init__(self, cluster: Cluster, *, as_user: str = "") -> None:
        if not cluster.token:
            raise Unavailable("the kubeconfig has no token, and tests that speak HTTP themselves need one")
        self._client = httpx.Client(
            base_url=cluster.server,
            verify=trust_of(cluster),
            headers={"Authorization": f"Bearer {cluster.token}", **({"Impersonate-User": as_user} if as_user else {})},
            timeout=_TIMEOUT_SECONDS,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> Object | None:
        """The object, or None if there is none."""
        try:
            return self.call("GET", path)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def list(self, path: str, *, labels: str = "") -> list[Object]:
        items: list[Object] = self.call("GET", f"{path}?labelSelector={labels}" if labels else path)["items"]
        return items

    def create(self, path: str, body: Object) -> Object:
        return self.call("POST", path, body)

    def replace(self, path: str, body: Object) -> Object:
        return self.call("PUT", path, body)

    def merge(self, path: str, body: Object) -> Object:
        """A JSON merge patch; of the status where the path ends so."""
        return self.call("PATCH", path, body, content_type="application/merge-patch+json")

    def delete(self, path: str, *, at_once: bool = False) -> None:
        """No error if it is gone. A pod on a node stays until its kubelet has ended it; `at_once`, it does not."""
        grace = {"gracePeriodSeconds": 0} if at_once else {}
        try:
            self.call("DELETE", path, {"propagationPolicy": "Background", **grace})
        except Refused as refused:
            if refused.status != 404:
                raise

    def call(
        self, method: str, path: str, body: Object | None = None, *, content_type: str = "application/json"
    ) -> Object:
        content = None if body is None else json.dumps(body)
        answer = self._client.request(method, path, content=content, headers={"Content-Type": content_type})
        said: Object = answer.json()
        if answer.status_code >= 300:
            raise Refused(f"{method} {path}", answer.status_code, said.get("message", ""))
        return said


def trust_of(cluster: Cluster) -> ssl.SSLContext:
    """Trusts the authority that the cluster's kubeconfig names."""
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "--output=json").stdout)
    authority = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
    return ssl.create_default_context(cadata=authority)
