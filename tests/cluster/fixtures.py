"""The way in for pytest: `pytest_plugins = ["tests.cluster.fixtures"]` in the root conftest.

Each fixture lives as long as the session, and what this machine cannot give skips its tests with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.cluster import host, images
from tests.cluster.cluster import Cluster, ExternalCluster
from tests.cluster.control_plane import start_control_plane
from tests.cluster.errors import Unavailable
from tests.cluster.images import Image
from tests.cluster.minio import MinioServer, start_minio
from tests.cluster.node import RealCluster, start_real_cluster
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


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[RealCluster | ExternalCluster]:
    """A control plane with a node that runs pods."""
    if external := ExternalCluster.from_environment():
        yield external
        return
    _or_skip(host.require_node)
    cluster = _or_skip(lambda: start_real_cluster(audit=True))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def cluster_minio(real_cluster: RealCluster | ExternalCluster) -> Iterator[MinioServer]:
    """On an address of this machine that pods of `real_cluster` reach, and tests too."""
    address = _or_skip(lambda: real_cluster.host_ip)
    server = start_minio(address=address)
    yield server
    server.close()


@pytest.fixture(scope="session")
def trainer_image(real_cluster: RealCluster | ExternalCluster) -> str:
    """The trainer's image as the cluster knows it; pods use `imagePullPolicy: IfNotPresent`."""
    return _loaded(real_cluster, images.trainer_image)


@pytest.fixture(scope="session")
def operator_image(real_cluster: RealCluster | ExternalCluster) -> str:
    """The operator's image as the cluster knows it; pods use `imagePullPolicy: IfNotPresent`."""
    return _loaded(real_cluster, images.operator_image)


def _loaded(cluster: RealCluster | ExternalCluster, build: Callable[[], Image]) -> str:
    image = _or_skip(build)
    _or_skip(lambda: cluster.load_image(image.archive))
    return image.reference
