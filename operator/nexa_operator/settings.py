"""The operator's own settings, from its environment. Read once, by `main.py`.

| variable | meaning | default |
|---|---|---|
| NEXA_TRAINER_IMAGE | image of jobs that name none | required |
| NEXA_TRAINER_HEAVY_IMAGE | the same for jobs on backend axolotl | none |
| NEXA_WATCH_NAMESPACE | the only namespace looked at; empty: all | empty |
| NEXA_DEFAULT_STORAGE | storage profile of jobs with an s3:// URI that name none | none |
| NEXA_NVIDIA_DEVICES | how names begin of devices whose plugin sets NVIDIA_VISIBLE_DEVICES, by commas | nvidia.com/ |
| NEXA_PROGRESS_INTERVAL_SECONDS | between two looks at a job's progress, so at most one status write in it | 10 |
| NEXA_RESYNC_INTERVAL_SECONDS | between two looks at every job, whether or not anything was heard of it | 60 |
| NEXA_WATCH_SILENCE_SECONDS | a watch that said nothing for so long is begun again | 70 |
| NEXA_METRICS_PORT | of /metrics and /healthz; 0: a free one on loopback | 8081 |
| NEXA_LOG_LEVEL | debug, info, warning, error | info |
| NEXA_LEASE_NAMESPACE | where the Lease lies that only one operator holds; empty: no Lease | empty |
| NEXA_LEASE_NAME | what it is called: one for each release | nexa |
| NEXA_IDENTITY | who holds it; the same after a restart of the container in its pod | host name |
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nexa_operator.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an administrator decides for all jobs."""

    trainer_image: str
    trainer_heavy_image: str = ""
    watch_namespace: str = ""
    default_storage: str = ""
    nvidia_devices: tuple[str, ...] = ("nvidia.com/",)
    progress_interval_seconds: float = 10.0
    resync_interval_seconds: float = 60.0
    watch_silence_seconds: float = 70.0
    """The server sends a bookmark a minute, and keeps what was missed for 75 s."""
    metrics_port: int = 8081
    log_level: int = logging.INFO
    lease_namespace: str = ""
    lease_name: str = "nexa"
    identity: str = ""
    num_workers: int = 8

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Raises SettingsError naming the variable."""
        image = environment.get("NEXA_TRAINER_IMAGE", "")
        if not image:
            raise SettingsError("NEXA_TRAINER_IMAGE is not set: it names the image of jobs that name none")
        return cls(
            trainer_image=image,
            trainer_heavy_image=environment.get("NEXA_TRAINER_HEAVY_IMAGE", ""),
            watch_namespace=environment.get("NEXA_WATCH_NAMESPACE", ""),
            default_storage=environment.get("NEXA_DEFAULT_STORAGE", ""),
            nvidia_devices=tuple(filter(None, environment.get("NEXA_NVIDIA_DEVICES", "nvidia.com/").split(","))),
            progress_interval_seconds=_number(environment, "NEXA_PROGRESS_INTERVAL_SECONDS", 10.0),
            resync_interval_seconds=_number(environment, "NEXA_RESYNC_INTERVAL_SECONDS", 60.0),
            watch_silence_seconds=_number(environment, "NEXA_WATCH_SILENCE_SECONDS", 70.0),
            metrics_port=int(_number(environment, "NEXA_METRICS_PORT", 8081)),
            log_level=_level(environment.get("NEXA_LOG_LEVEL", "info")),
            lease_namespace=environment.get("NEXA_LEASE_NAMESPACE", ""),
            lease_name=environment.get("NEXA_LEASE_NAME") or "nexa",
            identity=environment.get("NEXA_IDENTITY") or socket.gethostname(),
        )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    given = environment.get(name, "")
    try:
        value = float(given) if given else default
    except ValueError as exc:
        raise SettingsError(f"{name}: got {given!r}, expected a number") from exc
    if not 0 <= value <= 65_535:
        raise SettingsError(f"{name}: got {given!r}, expected 0 to 65535")
    return value


def _level(name: str) -> int:
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise SettingsError(f"NEXA_LOG_LEVEL: got {name!r}, expected debug, info, warning or error")
    return levels[name.upper()]
