"""The generated CustomResourceDefinition: structural, complete, and the bytes that are committed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from nexa_train.config import JobSpec, crd, spec
from nexa_train.errors import ConfigError

SPEC = crd.spec_schema()


def nodes(schema: dict[str, Any], path: str = "spec") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema node with its path."""
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


ALL = dict(nodes(SPEC))


def rules(path: str) -> list[str]:
    return [rule["rule"] for rule in ALL[path].get("x-kubernetes-validations", [])]


def test_the_committed_files_are_what_the_models_give():
    crd.main(["--check"])


def test_generating_twice_gives_the_same_bytes():
    assert crd.render() == crd.render()


def test_check_names_what_is_stale_and_writes_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"crds/train.nexa.dev_nexatrainingjobs.yaml.*run `python -m"):
        crd.main(["--check"], root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    crd.main([], root=tmp_path)
    crd.main(["--check"], root=tmp_path)


@pytest.mark.parametrize("word", ["$ref", "oneOf", "anyOf", "allOf", "const", "prefixItems", "propertyNames", "title"])
def test_nothing_that_is_not_structural_is_left(word):
    assert [path for path, node in ALL.items() if word in node] == []


def test_every_node_has_a_type_or_is_a_number_or_a_word():
    bare = [path for path, node in ALL.items() if "type" not in node and "x-kubernetes-int-or-string" not in node]
    assert bare == []


def test_exclusive_bounds_are_openapi_booleans_beside_an_inclusive_bound():
    for node in ALL.values():
        assert node.get("exclusiveMinimum", True) is True
        assert "exclusiveMinimum" not in node or "minimum" in node
    assert ALL["spec.optimizer.lr"]["exclusiveMinimum"] is True


def test_every_string_list_and_free_map_is_bounded_so_that_rules_have_a_bounded_cost():
    def bounded(node: dict[str, Any]) -> bool:
        if node.get("type") == "string":
            return "maxLength" in node or "enum" in node
        if node.get("type") == "array":
            return "maxItems" in node
        return "additionalProperties" not in node or "maxProperties" in node

    assert [path for path, node in ALL.items() if not bounded(node)] == []


def test_every_number_has_both_bounds():
    numbers = {path: node for path, node in ALL.items() if node.get("type") in ("integer", "number")}
    assert [path for path, node in numbers.items() if not {"minimum", "maximum"} <= set(node)] == []


def test_keys_are_camel_case():
    assert [path for path in ALL if "_" in path] == []


@pytest.mark.parametrize("path", ["spec.method", "spec.tuning"])
def test_a_tagged_union_is_one_object_without_a_default_inside(path):
    union = ALL[path]
    assert union["required"] == ["type"]
    assert [key for key, child in union["properties"].items() if "default" in child] == []
    assert set(union["default"]) == {"type"}


@pytest.mark.parametrize(
    ("path", "tag", "must", "must_not"),
    [
        ("spec.method", "sft", [], ["beta", "teacher", "temperature", "alpha"]),
        ("spec.method", "distill", ["teacher"], ["beta", "trainOn"]),
        ("spec.tuning", "full", [], ["rank", "alpha", "dropout", "targetModules", "doubleQuant"]),
        ("spec.tuning", "lora", ["rank"], ["doubleQuant"]),
    ],
)
def test_one_rule_a_branch_demands_its_keys_and_forbids_the_others(path, tag, must, must_not):
    (rule,) = [rule for rule in rules(path) if rule.startswith(f"self.type != '{tag}'")]
    for key in must:
        assert f" has(self.{key})" in rule or f"(has(self.{key})" in rule
    for key in must_not:
        assert f"!has(self.{key})" in rule


def test_branches_that_disagree_about_a_key_are_refused():
    branches = {
        "a": {"properties": {"x": {"type": "string", "maxLength": 1}}},
        "b": {"properties": {"x": {"type": "integer"}}},
    }
    with pytest.raises(ConfigError, match="disagree about x"):
        crd._Converter({})._all_keys(branches)


@pytest.mark.parametrize("key", ["microbatchSizePerGpu", "gradAccumulationSteps"])
def test_auto_or_a_number_is_int_or_string_with_a_rule(key):
    node = ALL[f"spec.training.{key}"]
    assert node["x-kubernetes-int-or-string"] is True
    assert node["default"] == "auto"
    assert "self == 'auto'" in rules(f"spec.training.{key}")[0]


def test_groups_default_to_an_empty_object_so_that_the_server_fills_what_is_inside():
    for group in ("model", "training", "optimizer", "cluster", "artifacts", "recovery", "schedule"):
        assert ALL[f"spec.{group}"]["default"] == {}
    assert ALL["spec.optimizer.betas"]["default"] == [0.9, 0.999]


def _validated_models() -> list[type[BaseModel]]:
    models = [item for item in vars(spec).values() if isinstance(item, type) and issubclass(item, BaseModel)]
    return [model for model in models if model.__pydantic_decorators__.model_validators]


def test_every_model_with_a_check_across_keys_has_it_in_cel_too():
    assert {model.__name__ for model in _validated_models()} == set(crd.CROSS_FIELD)


def test_everything_but_suspending_and_resizing_is_fixed_once_created():
    for group in (
        "model",
        "data",
        "method",
        "tuning",
        "backend",
        "training",
        "optimizer",
        "deepspeed",
        "axolotl",
        "artifacts",
        "recovery",
    ):
        assert "self == oldSelf" in rules(f"spec.{group}")
    loose = {"cluster": "numNodes", "schedule": "suspend"}
    for group, free in loose.items():
        fixed = [crd._same(key) for key in ALL[f"spec.{group}"]["properties"] if key != free]
        assert f"self == oldSelf || ({' && '.join(f'({same})' for same in fixed)})" in rules(f"spec.{group}")
    covered = {*loose, "image", "trackers"} | {
        group for group in SPEC["properties"] if "self == oldSelf" in rules(f"spec.{group}")
    }
    assert covered == set(SPEC["properties"])


def test_the_kind_has_a_short_name_a_category_and_a_status_of_its_own():
    built = crd.build()["spec"]
    assert built["names"]["shortNames"] == ["ntj"]
    assert built["names"]["categories"] == ["nexa"], "`kubectl delete all --all` is not to delete models"
    assert built["versions"][0]["subresources"] == {"status": {}}
    columns = [column["name"] for column in built["versions"][0]["additionalPrinterColumns"]]
    assert columns == ["Phase", "Nodes", "Progress", "Loss", "ETA", "Restarts", "Age"]


def test_every_field_is_described_in_the_spelling_of_manifests():
    told = {path: node.get("description", "") for path, node in (*nodes(SPEC), *nodes(crd.status_schema(), "status"))}
    told = {path: text for path, text in told.items() if not path.endswith(("[]", "{}"))}
    assert [path for path, text in told.items() if not text] == []
    others = {"exclude_node"}  # a value
    assert {word for text in told.values() for word in re.findall(r"\b[a-z]+_[a-z_]+\b", text)} <= others


def test_every_printed_column_is_in_the_schema():
    status = crd.status_schema()["properties"]
    for column in crd.build()["spec"]["versions"][0]["additionalPrinterColumns"]:
        where = column["jsonPath"].split(".")
        assert where[1] == "metadata" or where[2] in status


def test_the_name_rule_stands_at_the_root_where_metadata_can_be_seen():
    (rule,) = crd.build()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    assert "size(self.metadata.name) <= 45" in rule["rule"]


def test_defaults_in_the_schema_are_the_defaults_of_the_models():
    def fill(node: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
        for key, child in node.get("properties", {}).items():
            if key not in value and "default" in child:
                value[key] = child["default"]
            if isinstance(value.get(key), dict):
                value[key] = fill(child, dict(value[key]))
        return value

    data = {"data": {"remoteUri": "rows.jsonl"}}
    assert JobSpec.model_validate(fill(SPEC, dict(data))) == JobSpec.model_validate(data)
