"""What several files of this folder stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.api import Api
from tests.cluster.cluster import ExternalCluster
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster
from tests.cluster.paths import REPOSITORY
from tests.cluster.product import OPERATOR_NAMESPACE, fill_buckets, make_storage_profile, remove_storage_profile
from tests.cluster.run import run
from tests.cluster.tools import binary
from tests.e2e.fire import Field
from tests.integration.harness import Operator, kubeconfig_of_operator


@pytest.fixture(scope="module")
def ground(
    real_cluster: RealCluster | ExternalCluster,
    cluster_minio: MinioServer,
    trainer_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Field]:
    """The chart but for its operator, which is a process of these tests: they kill it and start it again."""
    if not isinstance(real_cluster, RealCluster):
        pytest.skip("processes of pods are killed only on a node that the tests start; unset NEXA_TEST_KUBECONFIG")
    fill_buckets(cluster_minio)
    make_storage_profile(real_cluster, cluster_minio, namespace="default")
    helm = [binary("helm"), f"--kubeconfig={real_cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}"]
    run([*helm, "upgrade", "--install", "nexa", REPOSITORY / "helm" / "nexa", "--create-namespace"])
    real_cluster.kubectl("scale", "deployment/nexa", f"--namespace={OPERATOR_NAMESPACE}", "--replicas=0")
    folder = tmp_path_factory.mktemp("operator")
    operator = Operator(
        kubeconfig_of_operator(real_cluster, folder),
        folder / "log.jsonl",
        NEXA_TRAINER_IMAGE=trainer_image,
        NEXA_LEASE_NAMESPACE=OPERATOR_NAMESPACE,
        NEXA_PROGRESS_INTERVAL_SECONDS="10",
    )
    yield Field(real_cluster, cluster_minio, operator, Api(real_cluster))
    real_cluster.kubectl("delete", "ntj", "--all", "--wait=true", "--timeout=60s", check=False)
    operator.kill()
    run([*helm, "uninstall", "nexa", "--wait"], check=False)
    remove_storage_profile(real_cluster, namespace="default")
