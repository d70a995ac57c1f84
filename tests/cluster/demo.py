"""`make cluster-demo`: a real cluster, the operator by Helm, examples/job.yaml by kubectl, the result verified.

Takes down at the end what it started. `python -m tests.cluster.demo`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from tests.cluster import host, images
from tests.cluster.errors import ClusterError
from tests.cluster.minio import MinioServer, start_minio
from tests.cluster.node import RealCluster, start_real_cluster
from tests.cluster.product import (
    EXAMPLE,
    fill_buckets,
    install_operator,
    make_storage_profile,
    wait_ended,
)
from tests.cluster.tools import binary

JOB = "two-ranks"


def main() -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    try:
        host.require_node()
        say("building the images, or finding them built")
        operator, trainer = images.operator_image(), images.trainer_image()
        say("starting Kubernetes with a node that runs pods")
        cluster = start_real_cluster()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        say("starting MinIO")
        minio = start_minio(address=cluster.host_ip, ledger=cluster.ledger)
        fill_buckets(minio)
        make_storage_profile(cluster, minio, namespace="default")
        say("loading the images")
        for image in (operator, trainer):
            cluster.load_image(image.archive)
        say("helm install")
        install_operator(cluster, operator_image=operator.reference, trainer_image=trainer.reference)
        say(f"kubectl apply -f {EXAMPLE.name}")
        return _train(cluster, minio, say)
    finally:
        cluster.stop()


def _train(cluster: RealCluster, minio: MinioServer, say: Callable[[str], None]) -> int:
    cluster.kubectl("apply", f"--filename={EXAMPLE}")
    watch = subprocess.Popen(
        [str(binary("kubectl")), f"--kubeconfig={cluster.kubeconfig}", "get", "ntj", "--watch"], stdout=sys.stdout
    )
    try:
        status = wait_ended(cluster, JOB)
    finally:
        watch.terminate()
        watch.wait()
    say("the job ended")
    for what in ("ntj", "jobs,services,pods", "events"):
        print(cluster.kubectl("get", what, "--output=wide" if what != "events" else "--sort-by=.lastTimestamp").stdout)
    uri = status["checkpoint"]["uri"]
    print(f"status.checkpoint: {status['checkpoint']}\n$ nexa verify {uri}", flush=True)
    done = subprocess.run([sys.executable, "-m", "nexa_train", "verify", uri], env={**os.environ, **minio.env()})
    say("done")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
