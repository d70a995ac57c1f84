"""What this version cannot do is refused by the API server when a job is made, and nothing else is."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, get_args

import pytest
from hypothesis import given

from nexa_operator.spec import OUR_NAME, parse
from nexa_train.config import policy
from nexa_train.config.spec import Method, OptimizerSpec, Tuning
from nexa_train.config.support import METHODS
from nexa_train.errors import ConfigError
from tests.cluster.api import Api, Refused
from tests.cluster.cluster import Cluster
from tests.integration.any_spec import settings_of, specs
from tests.integration.harness import RELEASE_NAMESPACE, Namespace, install_chart, manifest, new_namespace

pytestmark = pytest.mark.integration

Object = dict[str, Any]
SAID = tuple(rule["message"] for rule in policy.rules() if "message" in rule)
BACKENDS = "is not available on backend"


class Server:
    """The chart's policies, asked without making anything."""

    def __init__(self, ns: Namespace) -> None:
        self.api = Api(ns.cluster)
        self.path = f"/apis/train.nexa.dev/v1alpha1/namespaces/{ns.namespace}/nexatrainingjobs?dryRun=All"

    def refusal(self, spec: Object) -> str:
        """Of this version's rules; empty: there is none, whatever else may be wrong with the spec."""
        try:
            self.api.create(self.path, {**manifest("asked"), "spec": spec})
        except Refused as refused:
            told = refused.message
            return told if "ValidatingAdmissionPolicy" in told and (BACKENDS in told or told.endswith(SAID)) else ""
        return ""


@pytest.fixture(scope="module")
def server(control_plane: Cluster) -> Any:
    control_plane.kubectl("create", "namespace", RELEASE_NAMESPACE, check=False)
    install_chart(control_plane)
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/nexatrainingjobs.train.nexa.dev")
    with new_namespace(control_plane) as ns:
        yield Server(ns)


def verdict(spec: Object) -> str:
    """The operator's own; empty: it takes the job."""
    try:
        parse({"metadata": {"name": "asked"}, "spec": spec})
    except ConfigError as exc:
        return str(exc)
    return ""


def described(**groups: Object | str | list[str]) -> Object:
    return {"data": {"remoteUri": "s3://rows"}, "artifacts": {"uri": "s3://models"}, **groups}


def tags(union: Any) -> list[str]:
    return [each.model_fields["type"].default for each in get_args(get_args(union)[0])]


def test_of_every_backend_the_server_takes_what_the_operator_takes(server: Server) -> None:
    forms = {"pretrain": "text", "dpo": "preference"}
    names = get_args(OptimizerSpec.model_fields["name"].annotation)
    for backend, method, tuning, optimizer in itertools.product(METHODS, tags(Method), tags(Tuning), names):
        spec = described(
            backend=backend,
            data={"remoteUri": "s3://rows", "format": forms.get(method, "messages")},
            method={"type": method, **({"teacher": "tiny"} if method == "distill" else {})},
            tuning={"type": tuning, **({} if tuning == "full" else {"rank": 4})},
            optimizer={"name": optimizer},
        )
        told, refused = verdict(spec), server.refusal(spec)
        assert bool(told) == bool(refused), (told, refused)


CLAIM = {"name": "models", "mountPath": "/models", "claim": "models", "readOnly": False}
REFUSED: dict[str, Object] = {
    "a tracker": described(trackers=["wandb"]),
    "data elsewhere": described(data={"remoteUri": "gs://rows"}),
    "rows held out elsewhere": described(data={"remoteUri": "s3://rows", "validation": {"uri": "gs://held/out"}}),
    "artifacts elsewhere": described(artifacts={"uri": "gs://models"}),
    "artifacts nowhere": described(artifacts={"uri": "Memory://models"}),
    "flash without GPUs": described(model={"attn": "flash"}),
    "flash in fp32": described(model={"attn": "flash"}, cluster={"gpusPerNode": 1}, training={"precision": "fp32"}),
    "a name beside sizes": described(model={"name": "falcon3-1b", "dModel": 64, "nLayers": 1, "nHeads": 2}),
    "pairs to be packed": described(
        method={"type": "dpo"}, data={"remoteUri": "s3://rows", "format": "preference", "packing": True}
    ),
    "pairs on Axolotl's ranks": described(
        method={"type": "dpo"},
        data={"remoteUri": "s3://rows", "format": "preference"},
        backend="axolotl",
        cluster={"numNodes": 2},
    ),
    "adafactor on sharded weights": described(optimizer={"name": "adafactor"}, cluster={"gpusPerNode": 2}),
    "fewer nodes with a fixed accumulation": described(
        cluster={"numNodes": 4, "minNodes": 2}, training={"globalBatchSize": 8, "gradAccumulationSteps": 2}
    ),
    "the default folder": {"data": {"remoteUri": "s3://rows"}},
    "a folder of the pod": described(artifacts={"uri": "/models/team"}),
    "a folder beside the claim": described(artifacts={"uri": "/models2"}, cluster={"volumes": [CLAIM]}),
    "a folder above the claim": described(artifacts={"uri": "/models/../x"}, cluster={"volumes": [CLAIM]}),
    "a folder above the claim, escaped": described(
        artifacts={"uri": "file:///models/%2e%2e/x"}, cluster={"volumes": [CLAIM]}
    ),
    "a folder of a claim to read": described(
        artifacts={"uri": "/models/team"}, cluster={"volumes": [CLAIM | {"readOnly": True}]}
    ),
    "two profiles": described(
        data={"remoteUri": "s3://rows", "storage": "a"}, artifacts={"uri": "s3://models", "storage": "b"}
    ),
    "fewer nodes in a queue": described(cluster={"minNodes": 1}, schedule={"queueName": "team"}),
}


@pytest.mark.parametrize("spec", REFUSED.values(), ids=REFUSED)
def test_what_can_never_run_is_refused_when_it_is_made(server: Server, spec: Object) -> None:
    assert verdict(spec)
    assert server.refusal(spec)
    theirs = {**spec, "schedule": {**spec.get("schedule", {}), "managedBy": "example.com/other"}}
    assert not server.refusal(theirs), "what another controller can do is for that to say"
    ours = {**spec, "schedule": {**spec.get("schedule", {}), "managedBy": OUR_NAME}}
    assert server.refusal(ours)


def test_a_suspended_job_is_not_resized_to_what_can_never_run(server: Server) -> None:
    """It would end as ConfigRejected, with all that it has trained."""
    jobs = server.path.partition("?")[0]
    spec = described(optimizer={"name": "adafactor"}, schedule={"suspend": True})
    others = {**spec, "schedule": {**spec["schedule"], "managedBy": "example.com/other"}}
    for name, each in (("resized", spec), ("theirs", others)):
        server.api.create(jobs, {**manifest(name), "spec": each})
    resized = {"spec": {"cluster": {"numNodes": 2}}}
    with pytest.raises(Refused, match="adafactor takes no sharded weights"):
        server.api.merge(f"{jobs}/resized", resized)
    server.api.merge(f"{jobs}/theirs", resized)
    server.api.merge(
        f"{jobs}/resized", {"metadata": {"labels": {"seen": "yes"}}, "spec": {"schedule": {"suspend": False}}}
    )


@pytest.mark.parametrize("uri", ["/models", "/models/team", "file:///models/team", "/models/100%", "s3://models/team"])
def test_artifacts_that_outlive_their_pods_are_taken(server: Server, uri: str) -> None:
    spec = described(artifacts={"uri": uri}, cluster={"volumes": [CLAIM]})
    assert verdict(spec) == server.refusal(spec) == ""


def test_nothing_that_the_operator_takes_is_refused(server: Server) -> None:
    counts = Counter[str]()

    @settings_of(max_examples=200)
    @given(specs())
    def ask(spec: Object) -> None:
        told, refused = verdict(spec), server.refusal(spec)
        assert told or not refused, refused
        counts["refused" if refused else "told later" if told else "taken"] += 1

    ask()
    assert counts["refused"] >= 10, counts
    assert counts["taken"] >= 20, counts
