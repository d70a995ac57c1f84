"""Body -> job: what is refused, and that the server's defaults change nothing."""

from __future__ import annotations

import pytest

from nexa_operator.spec import is_ours, parse
from nexa_train.errors import ConfigError
from tests.unit.operator.builders import body


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"nonsense": 1, "training": {"maxSteps": "x"}}, "nonsense"),
        ({"training": {"globalBatchSize": 7}}, "7 is not divisible by the 2 ranks"),
        ({"trackers": ["wandb"]}, "wandb are not built into this version"),
        (
            {"data": {"remoteUri": "s3://a", "storage": "x"}, "artifacts": {"uri": "s3://b", "storage": "y"}},
            "data.storage x and artifacts.storage y differ",
        ),
    ],
)
def test_a_wrong_description_is_refused_with_the_key(groups, said):
    with pytest.raises(ConfigError, match=said):
        parse(body(**groups))


@pytest.mark.parametrize(
    "mount", ["/opt", "/opt/", "/opt/nexa", "/opt/nexa/bin", "/var", "/var/run/secrets", "/usr/bin"]
)
def test_nothing_is_mounted_over_the_trainer_or_the_system(mount):
    volume = {"name": "rows", "mountPath": mount, "claim": "rows"}
    with pytest.raises(ConfigError, match=r"mount_path|mountPath"):
        parse(body(cluster={"volumes": [volume]}))


def test_checkpoints_that_would_be_gone_with_their_pod_are_refused():
    with pytest.raises(ConfigError, match=r"artifacts.uri artifacts is a folder inside the pod.*use s3://"):
        parse(body(artifacts={"uri": "artifacts"}))


@pytest.mark.parametrize(
    ("mount", "read_only", "kept"), [("/models", False, True), ("/models", True, False), ("/other", False, False)]
)
def test_a_folder_of_a_writable_claim_is_taken_for_artifacts(mount, read_only, kept):
    volume = {"name": "models", "mountPath": mount, "claim": "models", "readOnly": read_only}
    described = body(artifacts={"uri": "/models/team"}, cluster={"numNodes": 2, "volumes": [volume]})
    if kept:
        assert parse(described).spec.artifacts.uri == "/models/team"
        return
    with pytest.raises(ConfigError, match="/models/team is a folder inside the pod"):
        parse(described)


def test_what_this_operator_cannot_do_together_is_refused_and_not_dropped_without_a_word():
    with pytest.raises(ConfigError, match=r"cluster\.minNodes with schedule\.queueName q"):
        parse(body(schedule={"queueName": "q"}, cluster={"minNodes": 1}))


def test_a_body_without_a_spec_is_a_wrong_description():
    bare = body()
    del bare["spec"]
    with pytest.raises(ConfigError, match="data"):
        parse(bare)


def test_annotations_that_tools_write_are_not_the_job_s():
    annotated = body()
    annotated["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 5000}
    annotated["metadata"]["labels"] = {"app.kubernetes.io/instance": "argo"}
    assert parse(annotated).run_id == parse(body()).run_id


@pytest.mark.parametrize(
    ("manager", "ours"),
    [(None, True), ("train.nexa.dev/nexa-operator", True), ("kueue.x-k8s.io/multikueue", False)],
)
def test_another_controller_s_job_is_not_ours_even_if_it_is_wrong(manager, ours):
    assert is_ours(body(schedule={"managedBy": manager}, nonsense=1)) is ours
