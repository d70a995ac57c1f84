"""The chart, rendered by the real Helm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexa_train.config import crd, policy
from nexa_train.config.protocol import PROGRESS_PORT
from tests.cluster.errors import ClusterError
from tests.cluster.tools import TOOLS, binary

CHART = Path(__file__).resolve().parents[2] / "helm" / "nexa"


@pytest.fixture(scope="module")
def helm() -> Path:
    if not TOOLS["helm"].built:
        pytest.skip("helm is not built: run python -m tests.cluster.tools helm")
    try:
        return binary("helm")
    except ClusterError as exc:
        pytest.skip(str(exc).splitlines()[0])


def run(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=False)


def render(helm: Path, *values: str, release: str = "nexa") -> list[dict[str, Any]]:
    """All objects of a release in namespace nexa-system."""
    chosen = [argument for value in values for argument in ("--set", value)]
    done = run(helm, "template", release, str(CHART), "--namespace", "nexa-system", *chosen)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def every(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


NO_TRAINER = {"matchExpressions": [{"key": "train.nexa.dev/job-uid", "operator": "DoesNotExist"}]}
"""Trainers carry any labels that their job says; this one nobody but the operator puts on a pod."""


def only_in(namespace: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": namespace}}


def test_the_chart_lints_without_a_complaint(helm):
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "value",
    [
        "trainerImage=",
        "logLevel=loud",
        "watchNamespace=Not_A_Name",
        "metrics.port=80",
        "typo=1",
        "crds.kept=true",
        "policy.allowedImages={it's}",
        "policy.trusted={a b}",
        "networkPolicy.store.ports={0}",
        "networkPolicy.namespaces={Team}",
        "replicas=0",
        "metrics.podMonitor.interval=often",
        "metrics.podMonitor.namespaces={Team}",
        "extraEnv[0].value=nameless",
    ],
)
def test_a_wrong_value_is_refused_by_the_schema(helm, value):
    done = run(helm, "template", "nexa", str(CHART), "--set", value)
    assert done.returncode != 0
    assert value.split("=")[0].split("[")[0].rsplit(".", 1)[-1] in done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("replicas=2", "lease.enabled=false"), "lease.enabled"),
        (("podDisruptionBudget.enabled=true",), "replicas"),
        (("extraEnv[0].name=NEXA_LOG_LEVEL", "extraEnv[0].value=debug"), "NEXA_LOG_LEVEL"),
        (("metrics.serviceMonitor.enabled=true", "metrics.service.enabled=false"), "metrics.service.enabled"),
    ],
)
def test_values_that_do_not_go_together_are_refused_by_name(helm, values, said):
    chosen = [argument for value in values for argument in ("--set", value)]
    done = run(helm, "template", "nexa", str(CHART), *chosen)
    assert done.returncode != 0
    assert "execution error" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("version", "fits"),
    [("v1.29.9", False), ("v1.29.9-eks-1", False), ("v1.30.0", True), ("v1.30.0-gke.1", True), ("v1.34.4", True)],
)
def test_a_cluster_without_validating_admission_policy_is_refused_by_its_version(helm, version, fits):
    done = run(helm, "template", "nexa", str(CHART), "--kube-version", version)
    assert (done.returncode == 0) is fits
    assert fits or "1.30" in done.stderr


def rules(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The operator's; what is for users has a label by which their roles take it up."""
    roles = [document for document in documents if document["kind"] in ("Role", "ClusterRole")]
    return [rule for role in roles if not aggregated_to(role) for rule in role["rules"]]


def aggregated_to(role: dict[str, Any]) -> set[str]:
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    return {label.removeprefix(prefix) for label in role["metadata"]["labels"] if label.startswith(prefix)}


@pytest.mark.parametrize("values", [(), ("watchNamespace=team-a",)])
def test_the_operator_may_not_read_secrets_and_has_no_wildcard(helm, values):
    for rule in rules(render(helm, *values)):
        assert "secrets" not in rule["resources"]
        assert "*" not in json.dumps(rule)


@pytest.mark.parametrize(("namespace", "of_the_cluster"), [("", {("nodes", "get")}), ("team-a", set())])
def test_the_rights_are_exactly_those_that_are_used(helm, namespace, of_the_cluster):
    granted = {
        (resource, verb)
        for rule in rules(render(helm, f"watchNamespace={namespace}"))
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == of_the_cluster | {
        *(("nexatrainingjobs", verb) for verb in ("get", "list", "watch", "patch", "delete")),
        ("nexatrainingjobs/status", "patch"),
        *(("jobs", verb) for verb in ("get", "list", "watch", "create", "patch", "delete")),
        *((kind, verb) for kind in ("jobsets", "pytorchjobs") for verb in ("get", "list", "create", "patch", "delete")),
        ("workloads", "list"),
        *(("pods", verb) for verb in ("list", "watch")),
        *(("services", verb) for verb in ("get", "create")),
        *(("events", verb) for verb in ("create", "list")),
        *(("leases", verb) for verb in ("get", "create", "patch")),
    }


def test_users_see_jobs_and_make_them_by_the_roles_that_they_have_and_never_write_their_status(helm):
    roles = [role for role in every(render(helm), "ClusterRole") if aggregated_to(role)]
    granted = {
        to: {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
        for role in roles
        for to in aggregated_to(role)
    }
    assert set(granted) == {"view", "edit", "admin"}
    assert granted["edit"] == granted["admin"]
    writes = {"create", "delete", "deletecollection", "patch", "update"}
    assert {verb for _, verb in granted["view"]} == {"get", "list", "watch"}
    assert {verb for resource, verb in granted["edit"] if resource == "nexatrainingjobs"} >= writes
    assert not writes & {verb for to in granted.values() for resource, verb in to if resource.endswith("/status")}
    for value in ("rbac.aggregate=false", "watchNamespace=team-a"):
        assert not [role for role in every(render(helm, value), "ClusterRole") if aggregated_to(role)]


def test_in_one_namespace_there_is_no_cluster_wide_right(helm):
    documents = render(helm, "watchNamespace=team-a", "networkPolicy.enabled=true")
    kinds = {document["kind"] for document in documents}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    places = {document["metadata"]["namespace"] for document in documents if document["kind"] == "Role"}
    assert places == {"team-a", "nexa-system"}, "the second is for the Lease alone"
    for binding in every(documents, "ValidatingAdmissionPolicyBinding"):
        assert binding["spec"]["matchResources"]["namespaceSelector"] == only_in("team-a")
        assert binding["metadata"]["name"].endswith(".team-a"), "another release may be for team-b"


def test_the_pod_is_restricted_and_replaced_rather_than_doubled(helm):
    deployment = one(render(helm), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["spec"]["replicas"] == 1
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_of_several_operators_one_is_replaced_at_a_time_and_one_is_kept(helm):
    documents = render(helm, "replicas=3", "podDisruptionBudget.enabled=true")
    deployment = one(documents, "Deployment")
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    budget = one(documents, "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1
    assert budget["selector"] == {**deployment["spec"]["selector"], **NO_TRAINER}
    assert not every(render(helm, "replicas=3"), "PodDisruptionBudget")


def test_what_is_set_of_security_is_merged_over_the_defaults(helm):
    values = ("podSecurityContext.runAsUser=null", "podSecurityContext.fsGroup=7", "securityContext.privileged=false")
    pod = one(render(helm, *values), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsGroup": 65532,
        "fsGroup": 7,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
    }


def test_variables_and_spread_reach_the_pod(helm):
    spread = "topologySpreadConstraints[0]"
    values = ("extraEnv[0].name=TZ", "extraEnv[0].value=UTC", f"{spread}.maxSkew=1", f"{spread}.topologyKey=zone")
    pod = one(render(helm, *values), "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"] == [{"name": "TZ", "value": "UTC"}]
    assert pod["topologySpreadConstraints"] == [{"maxSkew": 1, "topologyKey": "zone"}]


def test_an_image_may_be_pinned_by_its_digest(helm):
    digest = f"sha256:{'0a' * 32}"
    documents = render(helm, "image.repository=registry.example:5000/nexa", f"image.tag=1.2.3@{digest}")
    (container,) = one(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example:5000/nexa:1.2.3@{digest}"


@pytest.mark.parametrize("wanted", [True, False])
def test_another_chart_may_have_this_one_as_a_dependency_and_switch_it_off(helm, tmp_path, wanted):
    shutil.copytree(CHART, tmp_path / "charts" / "nexa")
    nexa = {"name": "nexa", "version": "0.1.0", "condition": "nexa.enabled"}
    chart = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0", "dependencies": [nexa]}
    (tmp_path / "Chart.yaml").write_text(json.dumps(chart))
    (tmp_path / "values.yaml").write_text(json.dumps({"global": {"any": 1}, "nexa": {"enabled": wanted}}))
    done = run(helm, "template", "all", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert ("kind: Deployment" in done.stdout) is wanted


def test_releases_for_a_namespace_each_share_no_object(helm):
    """Of one name in two namespaces, or of two names in one."""

    def names(release: str, place: str, watched: str) -> set[tuple[str, ...]]:
        values = ["--set", f"watchNamespace={watched},crds.enabled=false,networkPolicy.enabled=true"]
        done = run(helm, "template", release, str(CHART), "--namespace", place, *values)
        documents = [document for document in yaml.safe_load_all(done.stdout) if document]
        return {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]) for each in documents}

    first = names("nexa", "system-a", "team-a")
    assert not first & names("nexa", "system-b", "team-b")
    assert not first & names("other", "system-a", "team-b")


def test_another_setting_rolls_the_pod(helm):
    def hash_of(*values: str) -> str:
        template = one(render(helm, *values), "Deployment")["spec"]["template"]
        return template["metadata"]["annotations"]["train.nexa.dev/config-hash"]

    assert hash_of() == hash_of()
    assert hash_of() != hash_of("trainerImage=other:1")


def test_settings_reach_the_operator_as_the_variables_it_reads(helm):
    from nexa_operator.settings import Settings

    values = ("watchNamespace=team-a", "defaultStorage=minio", "logLevel=debug", "progressIntervalSeconds=3")
    settings = Settings.from_environment(one(render(helm, *values), "ConfigMap")["data"])
    assert (settings.watch_namespace, settings.default_storage) == ("team-a", "minio")
    assert (settings.progress_interval_seconds, settings.lease_namespace) == (3.0, "nexa-system")
    assert settings.trainer_image == "nexa-trainer:0.1.0"


def test_the_crd_is_the_generated_one_and_is_kept_on_uninstall(helm):
    rendered = one(render(helm), "CustomResourceDefinition")
    assert rendered["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert rendered == crd.build()


def test_the_crd_can_be_left_to_others_or_go_with_the_release(helm):
    assert "CustomResourceDefinition" not in {document["kind"] for document in render(helm, "crds.enabled=false")}
    assert "annotations" not in one(render(helm, "crds.keep=false"), "CustomResourceDefinition")["metadata"]


@pytest.mark.parametrize("release", ["r", "x" * 53, "nexa"])
def test_every_name_is_a_dns_label_of_at_most_63_characters(helm, release):
    for document in render(
        helm, f"fullnameOverride={'n' * 80}" if release == "r" else "trainerImage=i:1", release=release
    ):
        if document["kind"] != "CustomResourceDefinition":
            name = document["metadata"]["name"]
            assert len(name) <= 63
            assert not name.endswith("-")


def test_names_that_are_cut_still_tell_their_objects_apart(helm):
    names = [
        (document["kind"], document["metadata"]["name"], document["metadata"].get("namespace"))
        for document in render(helm, f"fullnameOverride={'n' * 80}")
    ]
    assert len(names) == len(set(names))


def test_every_policy_denies_and_is_bound(helm):
    documents = render(helm)
    policies = {policy["metadata"]["name"]: policy for policy in every(documents, "ValidatingAdmissionPolicy")}
    bindings = every(documents, "ValidatingAdmissionPolicyBinding")
    assert {binding["spec"]["policyName"] for binding in bindings} == set(policies)
    assert {policy["spec"]["failurePolicy"] for policy in policies.values()} == {"Fail"}
    assert {tuple(binding["spec"]["validationActions"]) for binding in bindings} == {("Deny",)}
    assert not every(render(helm, "policy.enabled=false"), "ValidatingAdmissionPolicy")


def test_the_policies_know_the_operator_by_the_account_that_it_runs_as(helm):
    documents = render(helm, "serviceAccount.name=trainer-in-chief", "policy.trusted={someone}")
    said = json.dumps(every(documents, "ValidatingAdmissionPolicy"))
    assert said.count("system:serviceaccount:nexa-system:trainer-in-chief") == 3
    assert "job-controller" not in said


def rules_of(documents: list[dict[str, Any]], name: str) -> list[str]:
    policies = {policy["metadata"]["name"]: policy for policy in every(documents, "ValidatingAdmissionPolicy")}
    return [rule["expression"] for rule in policies[name]["spec"]["validations"]]


def test_what_this_version_cannot_do_is_asked_of_every_size_and_the_administrator_s_lists_when_a_job_is_made(helm):
    documents = render(helm)
    assert rules_of(documents, "nexa-supported") == [rule["expression"] for rule in policy.rules()]
    assert not set(rules_of(documents, "nexa-jobs")) & set(rules_of(documents, "nexa-supported"))
    asked = {
        each["metadata"]["name"]: each["spec"]["matchConstraints"]["resourceRules"][0]["operations"]
        for each in every(documents, "ValidatingAdmissionPolicy")
    }
    assert (asked["nexa-jobs"], asked["nexa-supported"]) == (["CREATE"], ["CREATE", "UPDATE"])


def test_what_a_job_may_not_set_no_storage_profile_sets_for_it(helm):
    always = rules_of(render(helm), "nexa-profiles")
    assert all(any(word in rule for rule in always) for word in ("!name.startsWith('NEXA_')", "NVIDIA_"))
    limited = render(helm, "policy.allowedImages={registry.example/}")
    of_a_profile = next(rule for rule in rules_of(limited, "nexa-profiles") if rule not in always)
    of_a_job = next(rule for rule in rules_of(limited, "nexa-jobs") if "LD_" in rule)
    assert of_a_profile.replace("variables.names", "variables.env") == of_a_job


def test_a_namespace_with_jobs_gets_a_network_policy_and_no_other_does(helm):
    assert not every(render(helm), "NetworkPolicy")
    values = ("networkPolicy.enabled=true", "networkPolicy.namespaces={a,b}", "watchNamespace=b")
    policies = every(render(helm, *values), "NetworkPolicy")
    assert [policy["metadata"]["namespace"] for policy in policies] == ["a", "b", "nexa-system"]


def test_a_trainer_may_reach_names_its_store_and_its_like_and_nothing_else(helm):
    values = [f"networkPolicy.{value}" for value in ("enabled=true", "namespaces={a}", "store.ports={9000}")]
    values.append("networkPolicy.store.to[0].ipBlock.cidr=10.0.0.7/32")
    trainers, _ = every(render(helm, *values), "NetworkPolicy")
    spec = trainers["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    like = {"podSelector": spec["podSelector"]}
    assert spec["podSelector"]["matchExpressions"] == [{"key": "train.nexa.dev/job-uid", "operator": "Exists"}]
    ranks, names, store = spec["egress"]
    assert ranks == {"to": [like]}
    assert names["to"] == [{"namespaceSelector": only_in("kube-system")}]
    assert {port["port"] for port in names["ports"]} == {53}
    assert store == {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "ports": [{"protocol": "TCP", "port": 9000}]}
    from_ranks, from_operator = spec["ingress"]
    assert from_ranks == {"from": [like]}
    assert from_operator["ports"] == [{"protocol": "TCP", "port": PROGRESS_PORT}]
    assert from_operator["from"][0]["namespaceSelector"] == only_in("nexa-system")
    assert NO_TRAINER.items() <= from_operator["from"][0]["podSelector"].items()


def test_prometheus_reaches_trainers_where_it_is_named(helm):
    values = [f"networkPolicy.{value}" for value in ("enabled=true", "namespaces={a}")]
    peer = {"namespaceSelector": only_in("monitoring")}
    values.append(
        r"networkPolicy.monitoring.from[0].namespaceSelector.matchLabels.kubernetes\.io/metadata\.name=monitoring"
    )
    trainers, _ = every(render(helm, *values), "NetworkPolicy")
    assert trainers["spec"]["ingress"][2:] == [{"from": [peer], "ports": [{"protocol": "TCP", "port": PROGRESS_PORT}]}]


def test_the_operator_may_reach_names_the_api_server_and_trainers_and_is_asked_for_metrics_alone(helm):
    documents = render(helm, "networkPolicy.enabled=true", "metrics.port=9090")
    (own,) = every(documents, "NetworkPolicy")
    labels = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert own["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert NO_TRAINER.items() <= own["spec"]["podSelector"].items()
    assert [port["port"] for rule in own["spec"]["ingress"] for port in rule["ports"]] == [9090]
    assert [port["port"] for rule in own["spec"]["egress"] for port in rule["ports"]] == [53, 53, 443, 6443, 8080]
