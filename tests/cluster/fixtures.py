"""The way in for pytest: `pytest_plugins = ["tests.cluster.fixtures"]` in the root conftest.

Each fixture lives as long as the session, and what this machine cannot give skips its tests with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.cluster import host
from tests.cluster.cluster import Cluster, ExternalCluster
from tests.cluster.control_plane import start_control_plane
from tests.cluster.errors import Unavailable
from tests.cluster.minio import MinioServer, start_minio
from tests.cluster.run import first_line

T = TypeVar("T")


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with controllers and a scheduler; nodes only as `fake_nodes` makes them."""
    if external := ExternalCluster.from_environment():
        yield external
        return
    _or_skip(host.require_control_plane)
    plane = _or_skip(lambda: start_control_plane(audit=True))
    yield plane
    plane.stop()


@pytest.fixture(scope="session")
def minio_server() -> Iterator[MinioServer]:
    """On loopback, for tests in this process; pods reach `cluster_minio`."""
    server = start_minio()
    yield server
    server.close()


def _or_skip(make: Callable[[], T]) -> T:
    try:
        return make()
    except Unavailable as reason:
        pytest.skip(first_line(reason))
