"""Manifests: byte-exact round trips, and documents that must be refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_train.artifact.manifest import (
    FileEntry,
    Manifest,
    ManifestDraft,
    canonical_json,
    digest_of,
    parse_step_folder,
    run_folder,
    step_folder,
)
from nexa_train.errors import ConfigError, DamagedError
from tests.unit.artifact.builders import RUN, SHA, draft, entry, manifest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=4)
PATHS = st.from_regex(r"[a-z0-9_-]{1,8}(/[a-z0-9_-]{1,8}){0,2}", fullmatch=True)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
FILES = st.builds(
    FileEntry,
    path=PATHS,
    object=PATHS,
    size=st.integers(0, 2**53),
    sha256=DIGESTS,
    version_id=st.none() | TEXT,
    extra=st.dictionaries(st.just("parts"), JSON),
)
MANIFESTS = st.builds(
    Manifest,
    run_id=st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True).filter("checkpoints".__ne__),
    step=st.integers(0, 10**12),
    parent=st.none() | DIGESTS,
    weights_digest=st.none() | DIGESTS,
    config=OBJECTS,
    metrics=OBJECTS,
    dataset=OBJECTS,
    code=OBJECTS,
    world=OBJECTS,
    cursor=OBJECTS,
    logs=st.lists(JSON, max_size=3),
    files=st.lists(FILES, max_size=4, unique_by=lambda file: file.path).map(tuple),
    schema_version=st.sampled_from(["1.0", "1.7"]),
    extra=st.dictionaries(st.sampled_from(["signature", "later"]), JSON),
)


@given(MANIFESTS)
def test_a_manifest_survives_the_way_through_bytes(original: Manifest) -> None:
    content = original.to_bytes()
    read = Manifest.from_bytes(content)

    assert read == original
    assert read.to_bytes() == content
    assert read.digest == original.digest


@given(JSON)
def test_canonical_json_means_the_same_and_is_the_only_spelling(value: Any) -> None:
    content = canonical_json(value)

    assert json.loads(content) == value
    assert canonical_json(json.loads(content)) == content


def test_canonical_json_is_sorted_dense_and_utf8() -> None:
    assert canonical_json({"b": [1, 1.5, True, None], "a": "é"}) == '{"a":"é","b":[1,1.5,true,null]}'.encode()


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (math.nan, r"\$ is nan"),
        ({"metrics": {"loss": math.inf}}, r"\$\.metrics\.loss is inf"),
        ([1, [-math.inf]], r"\$\[1\]\[0\] is -inf"),
        ({1: "x"}, "key 1, expected a string"),
        ({"a": {1, 2}}, r"\$\.a is a set"),
        (b"bytes", "is a bytes"),
        ("\ud800", "surrogate"),
        ({"\ud800": 1}, "surrogate"),
    ],
)
def test_what_has_no_canonical_form_is_refused_with_its_place(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        canonical_json(value)


def test_endless_nesting_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]

    with pytest.raises(ValueError, match="nested more than 64 deep"):
        canonical_json(nested)


def test_a_manifest_has_the_documented_keys() -> None:
    document = manifest(parent=SHA, files=(entry(version_id="v1"),)).to_dict()

    assert sorted(document) == [
        "code",
        "config",
        "config_digest",
        "cursor",
        "dataset",
        "files",
        "logs",
        "metrics",
        "parent",
        "run_id",
        "schema_version",
        "step",
        "weights_digest",
        "world",
    ]
    assert document["files"] == [
        {
            "path": "model.safetensors",
            "object": "data/a1-0/model.safetensors",
            "size": 3,
            "sha256": SHA,
            "version_id": "v1",
        }
    ]
    assert document["config_digest"] == digest_of(document["config"])


def test_files_are_sorted_by_path_whatever_order_they_came_in() -> None:
    one, two = entry("a"), entry("b")

    assert manifest(files=(two, one)).digest == manifest(files=(one, two)).digest
    assert [file.path for file in manifest(files=(two, one)).files] == ["a", "b"]


def test_a_manifest_does_not_change_with_the_dict_it_was_made_from() -> None:
    metrics = {"loss": 1.0, "history": [1, 2]}
    made = manifest(metrics=metrics)
    before = made.digest
    metrics["history"].append(3)  # type: ignore[attr-defined]
    made.to_dict()["metrics"]["loss"] = 9

    assert made.digest == before


def test_a_manifest_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest().step = 51  # type: ignore[misc]


def test_fields_of_a_later_minor_version_are_kept() -> None:
    document = manifest().to_dict() | {"schema_version": "1.9", "signature": {"kind": "sigstore"}}
    document["files"][0]["parts"] = ["x"]

    assert Manifest.from_dict(document).to_dict() == document


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.1"])
def test_another_major_version_is_refused(version: str) -> None:
    document = manifest().to_dict() | {"schema_version": version}

    with pytest.raises(ConfigError, match=f"schema version {version}; this nexa reads 1.0"):
        Manifest.from_bytes(canonical_json(document))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schema_version": None}, "schema_version is None"),
        ({"schema_version": 1}, "schema_version is 1"),
        ({"step": -1}, "step -1 do not name a checkpoint"),
        ({"step": True}, "'step' is True, expected int"),
        ({"step": "50"}, "'step' is '50', expected int"),
        ({"run_id": "../other"}, "run_id '../other'"),
        ({"run_id": "checkpoints"}, "run_id 'checkpoints'"),
        ({"parent": "short"}, "parent is 'short', expected 64"),
        ({"parent": 7}, "parent is 7"),
        ({"weights_digest": SHA.upper()}, "weights_digest"),
        ({"config": []}, "'config' is"),
        ({"config": {"seed": 8}}, "config_digest is"),
        ({"logs": {}}, "'logs' is"),
        ({"files": {}}, "'files' is"),
        ({"files": [7]}, "not valid"),
        ({"files": [{}]}, "'path' is missing"),
        ({"files": [entry().to_dict()] * 2}, "two files have the path 'model.safetensors'"),
    ],
)
def test_an_invalid_document_is_refused_with_the_field(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DamagedError, match=complaint):
        Manifest.from_dict(manifest().to_dict() | changes)


@pytest.mark.parametrize("name", sorted(manifest().to_dict()))
def test_a_missing_field_is_named(name: str) -> None:
    document = manifest().to_dict()
    del document[name]

    with pytest.raises(DamagedError, match=name):
        Manifest.from_dict(document)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", "../escape"),
        ("path", "/etc/passwd"),
        ("path", ""),
        ("path", "a//b"),
        ("path", "a/./b"),
        ("path", "a\\b"),
        ("path", "a\x00b"),
        ("object", "data/../../../run.json"),
        ("size", -1),
        ("size", 1.0),
        ("size", True),
        ("sha256", "no"),
        ("version_id", 3),
    ],
)
def test_a_file_that_points_elsewhere_or_lies_is_refused(field: str, value: Any) -> None:
    document = manifest().to_dict()
    document["files"][0][field] = value

    with pytest.raises(DamagedError, match="not valid"):
        Manifest.from_dict(document)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step":' + b"9" * 5000 + b"}",
        json.dumps(manifest().to_dict()).encode(),
        manifest().to_bytes() + b"\n",
        manifest().to_bytes().replace(b'"step":50', b'"step":50,"step":50'),
        manifest().to_bytes().replace(b"1.25", b"NaN"),
        manifest().to_bytes().replace(b"1.25", b"1e999"),
        manifest().to_bytes().replace(b"1.25", b'"\\ud800"'),
    ],
)
def test_bytes_that_are_no_canonical_manifest_are_damaged(content: bytes) -> None:
    with pytest.raises(DamagedError):
        Manifest.from_bytes(content)


def test_reading_does_not_change_the_document() -> None:
    document = manifest().to_dict()
    before = json.dumps(document)
    Manifest.from_dict(document)

    assert json.dumps(document) == before


def test_a_draft_with_a_loss_that_is_no_number_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"metrics\.loss is nan"):
        draft(metrics={"loss": math.nan})


def test_an_extra_field_may_not_take_the_name_of_one_of_ours() -> None:
    with pytest.raises(ValueError, match="'step'"):
        ManifestDraft(config={}, extra={"step": 1}).complete(run_id=RUN, step=1, files=[])


@given(st.integers(0, 10**18 - 1))
def test_a_step_folder_is_parsed_back(step: int) -> None:
    assert parse_step_folder(step_folder(RUN, step)) == (RUN, step)


def test_step_folders_sort_like_steps() -> None:
    assert step_folder("run", 50) == "checkpoints/run/step-00000050"
    assert step_folder("run", 9) < step_folder("run", 10) < step_folder("run", 99_999_999)


@pytest.mark.parametrize(
    "folder",
    [
        "",
        "checkpoints/run",
        "checkpoints/run/step-50",
        "checkpoints/run/step-000000050",
        "checkpoints/run/step-0000005x",
        "checkpoints/run/step-00000050/data",
        "elsewhere/run/step-00000050",
        "checkpoints/../step-00000050",
        "checkpoints/checkpoints/step-00000050",
    ],
)
def test_other_folders_are_no_step_folders(folder: str) -> None:
    assert parse_step_folder(folder) is None


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "-a", "a b", "checkpoints", "x" * 129])
def test_run_ids_that_are_no_plain_names_are_refused(run_id: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        run_folder(run_id)


def test_a_negative_step_has_no_folder() -> None:
    with pytest.raises(ConfigError, match="step -1"):
        step_folder("run", -1)
