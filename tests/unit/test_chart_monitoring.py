"""The chart's monitors and alerts, against what the operator and its pods expose."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nexa_operator.metrics import Metrics
from nexa_operator.naming import LABEL_ATTEMPT, LABEL_JOB_NAME
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import job as runtime
from tests.unit.operator.builders import UID, job
from tests.unit.test_chart import every, helm, one, render

__all__ = ["helm"]

MONITORS = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
ALL = tuple(f"metrics.{each}.enabled=true" for each in ("serviceMonitor", "podMonitor", "rules"))
OF_TARGET = {"namespace", "job"}
"""Labels that Prometheus gives whatever a ServiceMonitor finds."""


def rules(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (group,) = one(documents, "PrometheusRule")["spec"]["groups"]
    return group["rules"]


def exposed() -> dict[str, list[dict[str, str]]]:
    """Series by name, with something in each; a counter without a label has one from the start."""
    metrics = Metrics()
    metrics.failed(ValueError())
    metrics.restarted("Stalled")
    metrics.called("get", 200)
    metrics.heard("nexatrainingjobs")
    metrics.listed([], datetime.datetime.now(datetime.UTC))
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_nothing_of_the_prometheus_operator_is_made_unasked(helm):
    assert not {document["kind"] for document in render(helm)} & set(MONITORS)


@pytest.mark.parametrize("value", ALL)
def test_each_is_made_by_itself_with_the_labels_by_which_a_prometheus_chooses_it(helm, value):
    group = value.split(".")[1]
    documents = [
        document
        for document in render(helm, value, f"metrics.{group}.labels.release=prom")
        if document["kind"] in MONITORS
    ]
    (made,) = documents
    assert made["kind"].lower() in (group.lower(), "prometheusrule")
    assert made["metadata"]["labels"]["release"] == "prom"
    assert made["metadata"]["labels"]["app.kubernetes.io/name"] == "nexa"


def test_the_operator_is_scraped_by_its_service(helm):
    documents = render(helm, *ALL, "metrics.serviceMonitor.interval=15s")
    spec, service = one(documents, "ServiceMonitor")["spec"], one(documents, "Service")
    assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = spec["endpoints"]
    assert endpoint == {"port": "metrics", "interval": "15s"}
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert "interval" not in one(render(helm, *ALL), "ServiceMonitor")["spec"]["endpoints"][0]


def test_trainers_are_scraped_as_the_operator_makes_them(helm):
    spec = one(render(helm, *ALL), "PodMonitor")["spec"]
    plan = make_plan(job(), owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1", storage=""))
    pod = runtime.gang(plan)["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert spec["selector"] == {"matchExpressions": [{"key": LABEL_JOB_NAME, "operator": "Exists"}]}
    assert LABEL_JOB_NAME in labels
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    sources = {rule["targetLabel"]: rule["sourceLabels"] for rule in endpoint["relabelings"]}
    # As Prometheus spells a pod's labels.
    spelled = {name: ["__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", name)] for name in labels}
    assert sources == {"training_job": spelled[LABEL_JOB_NAME], "attempt": spelled[LABEL_ATTEMPT]}


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ((), {"any": True}),
        (("watchNamespace=team-a",), {"matchNames": ["team-a"]}),
        (("metrics.podMonitor.namespaces={b,c}",), {"matchNames": ["b", "c"]}),
    ],
)
def test_trainers_are_looked_for_where_jobs_may_be(helm, values, places):
    assert one(render(helm, *ALL, *values), "PodMonitor")["spec"]["namespaceSelector"] == places


def test_every_alert_says_what_is_wrong_and_what_to_do(helm):
    alerts = rules(render(helm, *ALL))
    assert len({alert["alert"] for alert in alerts}) == len(alerts) == 5
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"].endswith(".")
        assert len(alert["annotations"]["description"]) > 100


def test_alerts_name_only_series_that_the_operator_exposes(helm):
    series = exposed()
    for alert in rules(render(helm, *ALL)):
        told = alert["expr"] + " ".join(alert["annotations"].values())
        assert set(re.findall(r"\bnexa_\w+", told)) <= set(series), alert["alert"]
        chosen = re.findall(r"(nexa_\w+)\{([^}]*)\}", alert["expr"])
        assert len(chosen) == len(re.findall(r"\bnexa_\w+", alert["expr"])), "each chooses the operator of its release"
        for name, matchers in chosen:
            wanted = dict(re.findall(r'(\w+)="([^"]*)"', matchers))
            assert wanted.keys() >= OF_TARGET
            own = {label: value for label, value in wanted.items() if label not in OF_TARGET}
            assert any(own.items() <= labels.items() for labels in series[name]), (alert["alert"], own)
        for by in re.findall(r"by \(([^)]*)\)", alert["expr"]):
            known = {label for name, _ in chosen for labels in series[name] for label in labels}
            assert {label.strip() for label in by.split(",")} <= known | OF_TARGET


def test_alerts_are_of_the_operator_that_this_release_s_service_monitor_finds(helm):
    documents = render(helm, *ALL, release="other")
    service = one(documents, "Service")["metadata"]
    for alert in rules(documents):
        jobs = set(re.findall(r'job="([^"]*)"', alert["expr"]))
        assert jobs == {service["name"]}, "without jobLabel the job is the Service's name"
        assert set(re.findall(r'namespace="([^"]*)"', alert["expr"])) == {service["namespace"]}


def test_names_of_what_is_off_by_default_fit_and_differ_too(helm):
    values = (*ALL, "replicas=2", "podDisruptionBudget.enabled=true", f"fullnameOverride={'n' * 80}")
    documents = [each for each in render(helm, *values) if each["kind"] != "CustomResourceDefinition"]
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in documents]
    assert len(names) == len(set(names))
    assert all(len(name) <= 63 for *_, name in names)
    assert every(documents, "PodDisruptionBudget")
