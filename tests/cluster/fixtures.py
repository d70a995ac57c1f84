"""The way in for pytest: `pytest_plugins = ["tests.cluster.fixtures"]` in the root conftest.

Each fixture lives as long as the session, and what this machine cannot give skips its tests with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster import host, images
from tests.cluster.cluster import Cluster, ExternalCluster
from tests.cluster.control_plane import start_control_plane
from tests.cluster.errors import Unavailable
from tests.cluster.images import Image
from tests.cluster.minio import MinioServer, start_minio
from tests.cluster.node import RealCluster, start_real_cluster
from tests.cluster.run import first_line
from tests.cluster.slurm import Slurm, start_slurm


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with _skipping():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with _skipping():
        yield


@contextmanager
def _skipping() -> Iterator[None]:
    """`Unavailable` says what this machine cannot give, be it raised by a fixture or in a test."""
    try:
        yield
    except Unavailable as reason:
        pytest.skip(first_line(reason))


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with controllers and a scheduler; nodes only as `fake_nodes` makes them."""
    if external := ExternalCluster.from_environment():
        yield external
        return
    host.require_control_plane()
    plane = start_control_plane(audit=True)
    yield plane
    plane.stop()


@pytest.fixture(scope="session")
def minio_server() -> Iterator[MinioServer]:
    """On loopback, for tests in this process; pods reach `cluster_minio`."""
    server = start_minio()
    yield server
    server.close()


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[RealCluster | ExternalCluster]:
    """A control plane with a node that runs pods."""
    if external := ExternalCluster.from_environment():
        yield external
        return
    host.require_node()
    cluster = start_real_cluster(audit=True)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def cluster_minio(real_cluster: RealCluster | ExternalCluster) -> Iterator[MinioServer]:
    """On an address of this machine that pods of `real_cluster` reach, and tests too."""
    server = start_minio(address=real_cluster.host_ip)
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


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A Slurm with two nodes; it needs no Kubernetes."""
    host.require_slurm()
    cluster = start_slurm()
    yield cluster
    cluster.stop()


def _loaded(cluster: RealCluster | ExternalCluster, build: Callable[[], Image]) -> str:
    image = build()
    cluster.load_image(image.archive)
    return image.reference
