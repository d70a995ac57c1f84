"""The operator's environment, its metrics server, and what kopf is told."""

from __future__ import annotations

import itertools
import logging

import httpx
import pytest

from nexa_operator.errors import SettingsError
from nexa_operator.main import kopf_settings
from nexa_operator.metrics import Metrics, serving
from nexa_operator.settings import Settings


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "NEXA_TRAINER_IMAGE is not set"),
        ({"NEXA_TRAINER_IMAGE": ""}, "NEXA_TRAINER_IMAGE is not set"),
        ({"NEXA_TRAINER_IMAGE": "i", "NEXA_METRICS_PORT": "http"}, "NEXA_METRICS_PORT: got 'http'"),
        ({"NEXA_TRAINER_IMAGE": "i", "NEXA_METRICS_PORT": "70000"}, "expected 0 to 65535"),
        ({"NEXA_TRAINER_IMAGE": "i", "NEXA_PROGRESS_INTERVAL_SECONDS": "-1"}, "NEXA_PROGRESS_INTERVAL_SECONDS"),
        ({"NEXA_TRAINER_IMAGE": "i", "NEXA_LOG_LEVEL": "loud"}, "NEXA_LOG_LEVEL: got 'loud'"),
    ],
)
def test_a_wrong_variable_is_named(environment, said):
    with pytest.raises(SettingsError, match=said):
        Settings.from_environment(environment)


def test_empty_variables_mean_the_defaults_as_the_chart_writes_them():
    empty = ("NEXA_WATCH_NAMESPACE", "NEXA_DEFAULT_STORAGE", "NEXA_LEASE_NAMESPACE", "NEXA_METRICS_PORT")
    settings = Settings.from_environment({"NEXA_TRAINER_IMAGE": "i", **dict.fromkeys(empty, "")})
    assert (settings.metrics_port, settings.progress_interval_seconds) == (8081, 10.0)
    assert settings.log_level == logging.INFO
    assert settings.identity


def test_kopf_waits_for_an_api_server_for_ever_and_starts_anew_each_time():
    backoffs = kopf_settings(Settings(trainer_image="i")).networking.error_backoffs
    assert len(list(itertools.islice(backoffs, 1000))) == 1000
    assert next(iter(backoffs)) == next(iter(backoffs))


def test_kopf_is_told_to_write_nothing_and_to_watch_only_what_carries_our_label():
    settings = kopf_settings(Settings(trainer_image="i"))
    assert settings.posting.enabled is False
    assert settings.scanning.disabled is True
    assert set(settings.watching.label_selectors.values()) == {"train.nexa.dev/job-uid"}


@pytest.mark.anyio
async def test_metrics_and_health_are_served_on_one_port():
    metrics = Metrics()
    metrics.restarted("OOMKilled")
    async with serving(metrics, port=0) as port, httpx.AsyncClient(trust_env=False) as client:
        health = await client.get(f"http://127.0.0.1:{port}/healthz")
        exposition = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert health.status_code == 200
    assert 'nexa_restarts_total{cause="OOMKilled"} 1.0' in exposition.text
    for name in ("nexa_reconcile_seconds", "nexa_queue_depth", "nexa_reconcile_errors"):
        assert name in exposition.text
