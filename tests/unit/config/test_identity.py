"""What makes two jobs the same run, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexa_train.config import API_VERSION, KIND, Job
from nexa_train.config.load import job_from_object, load_job, recipe_names
from tests.unit.config.builders import job

WHERE_AND_WHEN: dict[str, Any] = {
    "cluster": {"num_nodes": 2, "labels": {"team": "a"}, "env": [{"name": "A", "value": "b"}]},
    "schedule": {"queue_name": "gpu", "priority": "high", "suspend": True},
    "recovery": {"max_restarts": 9, "rules": [{"exit_codes": [1], "action": "fail"}]},
    "artifacts": {"uri": "s3://models", "storage": "default", "keep_last": 2},
    "image": "registry.example/trainer:1",
    "trackers": ["mlflow"],
}

WHAT: dict[str, Any] = {
    "model": {"max_seq_len": 256},
    "data": {"remote_uri": "other.jsonl"},
    "data version": {"data": {"dataset_version": "2"}},
    "method": {"type": "sft", "train_on": "all"},
    "tuning": {"type": "lora", "rank": 8},
    "backend": "hf",
    "training": {"seed": 1},
    "optimizer": {"lr": 1e-4},
    "deepspeed": {"zero_stage": 3},
    "axolotl": {"sharding": "fsdp"},
}


def changed(group: str, value: Any) -> Job:
    return job(**(value if group not in Job.model_fields["spec"].annotation.model_fields else {group: value}))


@pytest.mark.parametrize("group", WHERE_AND_WHEN)
def test_where_and_when_a_job_runs_does_not_make_it_another_run(group: str) -> None:
    other = changed(group, WHERE_AND_WHEN[group])
    assert other.spec != job().spec
    assert other.run_id == job().run_id


@pytest.mark.parametrize("group", WHAT)
def test_what_a_job_trains_makes_it_another_run(group: str) -> None:
    assert changed(group, WHAT[group]).run_id != job().run_id


def test_every_group_of_the_spec_is_either_identity_or_not() -> None:
    tested = set(WHERE_AND_WHEN) | {group for group in WHAT if " " not in group}
    assert tested == set(Job.model_fields["spec"].annotation.model_fields)


def test_name_and_namespace_stand_in_the_run_id_before_the_hash() -> None:
    team = Job.model_validate({"metadata": {"name": "a-b", "namespace": "team"}, "spec": job().spec})
    assert team.run_id == job().run_id.replace("default-demo-", "team-a-b-")
    assert len(team.run_id.removeprefix("team-a-b-")) == 10


def test_names_that_run_together_are_two_runs() -> None:
    named = [("team", "a-x"), ("team-a", "x")]
    ids = {Job.model_validate({"metadata": {"namespace": n, "name": j}, "spec": job().spec}).run_id for n, j in named}
    assert len(ids) == 2
    assert all(each.startswith("team-a-x-") for each in ids)


def test_labels_and_annotations_do_not_make_another_run() -> None:
    metadata = {"name": "demo", "labels": {"a": "b"}, "annotations": {"c": "d"}}
    assert Job.model_validate({"metadata": metadata, "spec": job().spec}).run_id == job().run_id


def test_both_spellings_are_one_run() -> None:
    snake = {
        "data": {"remote_uri": "x", "dataset_version": "1"},
        "training": {"global_batch_size": 16, "max_steps": 3},
        "tuning": {"type": "lora", "rank": 4, "target_modules": ["q"]},
    }
    camel = {
        "data": {"remoteUri": "x", "datasetVersion": "1"},
        "training": {"globalBatchSize": 16, "maxSteps": 3},
        "tuning": {"type": "lora", "rank": 4, "targetModules": ["q"]},
    }
    runs = {Job.model_validate({"metadata": {"name": "a"}, "spec": spec}).run_id for spec in (snake, camel)}
    assert len(runs) == 1


def test_a_default_that_is_written_down_is_one_that_is_left_out() -> None:
    written = job().spec.model_dump(mode="json")
    assert Job.model_validate({"metadata": {"name": "demo"}, "spec": written}).run_id == job().run_id


def test_whole_numbers_for_fractions_are_the_same_run() -> None:
    assert job(training={"epochs": 1}).run_id == job(training={"epochs": 1.0}).run_id


def test_the_run_id_of_a_pinned_job_never_changes() -> None:
    # If this fails, every run that was started before would no longer be found by its job.
    pinned = job(
        "gsm8k-sft",
        model={"name": "tiny", "max_seq_len": 256},
        data={"remote_uri": "s3://datasets/gsm8k.jsonl", "validation": {"fraction": 0.02}, "packing": True},
        tuning={"type": "lora", "rank": 16},
        training={"global_batch_size": 64, "max_steps": 200, "seed": 7},
        optimizer={"lr": 2e-4, "warmup_steps": 10},
    )
    assert pinned.run_id == "default-gsm8k-sft-3178f91496"


def manifest_of(original: Job) -> Job:
    body = original.as_manifest()
    assert (body["apiVersion"], body["kind"]) == (API_VERSION, KIND)
    return job_from_object(body)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_as_manifest_is_the_same_job(name: str) -> None:
    assert manifest_of(load_job(recipe=name)) == load_job(recipe=name)


@pytest.mark.parametrize("group", [*WHERE_AND_WHEN, *WHAT])
def test_a_job_as_manifest_is_the_same_job(group: str) -> None:
    original = changed(group, {**WHERE_AND_WHEN, **WHAT}[group])
    assert manifest_of(original) == original


@settings(max_examples=50)
@given(
    method=st.sampled_from(
        [
            {"type": "sft"},
            {"type": "sft", "train_on": "last_turn"},
            {"type": "pretrain"},
            {"type": "distill", "teacher": "falcon3-10b", "alpha": 0.25},
        ]
    ),
    tuning=st.sampled_from(
        [{"type": "full"}, {"type": "lora", "rank": 4}, {"type": "qlora", "rank": 2, "double_quant": False}]
    ),
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-9, 10),
    nodes=st.sampled_from([1, 2, 4]),
)
def test_any_job_as_manifest_is_the_same_run(
    method: dict[str, Any], tuning: dict[str, Any], seed: int, lr: float, nodes: int
) -> None:
    original = job(
        method=method, tuning=tuning, training={"seed": seed}, optimizer={"lr": lr}, cluster={"num_nodes": nodes}
    )
    assert manifest_of(original).run_id == original.run_id


def test_a_manifest_leaves_defaults_out() -> None:
    assert job().as_manifest()["spec"] == {"data": {"remoteUri": "train.jsonl"}}


def test_a_manifest_names_the_branch_of_a_union() -> None:
    assert job(tuning={"type": "lora", "rank": 8}).as_manifest()["spec"]["tuning"] == {"type": "lora", "rank": 8}
