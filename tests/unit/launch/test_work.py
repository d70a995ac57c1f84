"""What a launcher hands its ranks comes through JSON as it was."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nexa_train.launch.node import Node, adopt_environment, rank_environment
from nexa_train.launch.work import RankWork
from nexa_train.models.locate import Located
from nexa_train.plan import make_plan
from nexa_train.registry import MODELS, Architecture
from tests.unit.config.builders import job


def work(scratch: Architecture | None) -> RankWork:
    described = job(tuning={"type": "lora", "rank": 4}, cluster={"num_nodes": 2})
    plan = make_plan(described.spec, num_sequences=10, architecture=scratch, threads=2)
    located = Located(Path("/models/a"), scratch, "scratch")
    return RankWork(described, plan, located, Path("/cache/a"), {"rows": 3}, {"revision": None}, "/artifacts", 2)


@pytest.mark.parametrize("scratch", [None, MODELS["tiny"].architecture], ids=["weights", "from scratch"])
def test_work_comes_through_json_as_it_was(scratch: Architecture | None) -> None:
    given = work(scratch)
    assert RankWork.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    from_hub = replace(given, located=Located(Path("/cache/a"), scratch, "hub a/b@c", hub_id="a/b", revision="c"))
    assert RankWork.from_dict(json.loads(json.dumps(from_hub.to_dict()))) == from_hub


def test_the_world_of_a_manifest_is_what_the_bits_depend_on() -> None:
    facts = work(None).world_facts()
    assert facts.pop("processor")
    assert facts == {
        "ranks": 2,
        "nodes": 2,
        "microbatch": 1,
        "accumulation": 4,
        "threads": 2,
        "backend": "fsdp",
        "precision": "fp32",
    }


@pytest.mark.parametrize(("microbatch", "adapts"), [(4, True), (2, True), (1, False)])
def test_a_microbatch_gives_way_down_to_one(microbatch: int, adapts: bool) -> None:
    described = job(training={"global_batch_size": 4})
    plan = make_plan(described.spec, num_sequences=10, architecture=MODELS["tiny"].architecture, microbatch=microbatch)
    assert replace(work(None), job=described, plan=plan).adapts_microbatch is adapts


def test_ranks_inherit_no_place_in_a_world_that_others_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "PET_SHUTDOWN_TIMEOUT": "60"}.items():
        monkeypatch.setenv(name, value)
    environment = rank_environment(work(None), Node(count=2))
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(environment)
    assert environment["PET_SHUTDOWN_TIMEOUT"] == "60", "torchrun's own settings reach it"


def test_what_a_job_gives_its_containers_the_launcher_has_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "before")
    values = {"AWS_ENDPOINT_URL": "https://store", "OMP_NUM_THREADS": "64"}
    env = [{"name": name, "value": value} for name, value in values.items()]
    adopt_environment(job(cluster={"env": env}))
    assert {name: os.environ[name] for name in values} == values
    environment = rank_environment(work(None), Node())
    assert environment["AWS_ENDPOINT_URL"] == "https://store"
    assert environment["OMP_NUM_THREADS"] == str(work(None).plan.threads), "but for what equal bits need"
