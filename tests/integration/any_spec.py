"""Any valid spec of a NexaTrainingJob, and any change of any leaf, as hypothesis strategies over the CRD's schema."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_train.config import JobSpec
from nexa_train.config.crd import spec_schema
from nexa_train.config.spec import Method, Tuning

Spec = dict[str, Any]
Path = tuple[str, ...]

SCHEMA = spec_schema()
_UNIONS = {"method": get_args(get_args(Method)[0]), "tuning": get_args(get_args(Tuning)[0])}
_MOST = {
    ("cluster", "numNodes"): 3,
    ("cluster", "minNodes"): 1,
    ("cluster", "gpusPerNode"): 2,
}
"""The control plane of a test has no room for a thousand pods a job."""
_LEAST = {("schedule", "activeDeadlineSeconds"): 3600, ("schedule", "ttlSecondsAfterFinished"): 3600}
"""Jobs shall outlive their test."""
_PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
_KEYS = st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,5}/[a-z]{1,8})?", fullmatch=True)
_WHAT_RUNS = ("model", "method", "tuning", "backend", "optimizer", "deepspeed", "axolotl", "trackers")
"""Groups that this version may refuse in part."""


def leaves(node: Mapping[str, Any] = SCHEMA, path: Path = ()) -> Iterator[Path]:
    """Every key that holds a value; `[]` stands for an item of a list."""
    if "properties" in node:
        for key, child in node["properties"].items():
            yield from leaves(child, (*path, key))
    elif "properties" in node.get("items", {}):
        yield from leaves(node["items"], (*path, "[]"))
    else:
        yield path


def values(node: Mapping[str, Any], path: Path = ()) -> st.SearchStrategy[Any]:
    """What the schema takes there."""
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return st.one_of(st.integers(1, 4), st.just("auto"))
    match node["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            most = min(node.get("maximum", 2**31), node.get("minimum", 0) + 1000)
            least = _LEAST.get(path, node.get("minimum", 0))
            return st.integers(least, max(least, _MOST.get(path, most)))
        case "number":
            return _numbers(node)
        case "string":
            return _texts(node)
        case "array":
            return st.lists(values(node["items"], (*path, "[]")), min_size=node.get("minItems", 0), max_size=2).filter(
                lambda items: len(items) <= node.get("maxItems", 2)
            )
        case _:
            return _objects(node, path)


def _numbers(node: Mapping[str, Any]) -> st.SearchStrategy[float]:
    least, most = node.get("minimum", 0), min(node.get("maximum", 1000), 1000)
    return st.floats(
        least,
        most,
        exclude_min=node.get("exclusiveMinimum", False),
        exclude_max=node.get("exclusiveMaximum", False) and most == node.get("maximum"),
        allow_nan=False,
        # The least floats come back from JSON in Go as they went, but nobody trains with them.
        allow_subnormal=False,
        width=32,
    )


def _texts(node: Mapping[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" in node:
        found = st.from_regex(node["pattern"], fullmatch=True, alphabet=st.characters(codec="ascii"))
        return found.filter(lambda text: len(text) <= node["maxLength"] and text.isprintable())
    return st.text(_PRINTABLE, min_size=node.get("minLength", 0), max_size=12)


def _objects(node: Mapping[str, Any], path: Path) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" not in node:
        return st.dictionaries(_KEYS, values(node["additionalProperties"], path), max_size=2)
    required = node.get("required", [])
    kinds = {key: values(child, (*path, key)) for key, child in node["properties"].items()}
    drawn = st.fixed_dictionaries(
        {key: kinds[key] for key in required},
        optional={key: kind for key, kind in kinds.items() if key not in required},
    )
    return drawn if path not in [(name,) for name in _UNIONS] else drawn.map(lambda found: _of_its_type(found, path[0]))


def _of_its_type(drawn: dict[str, Any], union: str) -> dict[str, Any]:
    """The schema has the keys of all types beside one another."""
    (model,) = (each for each in _UNIONS[union] if each.model_fields["type"].default == drawn["type"])
    own = {field.alias: field for field in model.model_fields.values()}
    needed = {key: 8 if key == "rank" else "teacher" for key, field in own.items() if field.is_required()}
    return needed | {key: value for key, value in drawn.items() if key in own}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A spec that the models take. Most of them ask for nothing that this version or cluster may not have."""
    groups = draw(st.lists(st.sampled_from(sorted(SCHEMA["properties"])), unique=True, min_size=3))
    plain = draw(st.sampled_from([True, True, True, False]))
    kept = [group for group in {*groups, "data"} if not (plain and group in _WHAT_RUNS)]
    spec = {group: draw(values(SCHEMA["properties"][group], (group,))) for group in sorted(kept)}
    _mend(spec, draw(st.integers(1, 2)))
    # Its end takes pods that run, which these tests have not.
    spec.get("schedule", {}).pop("deletionPolicy", None)
    if plain:
        _make_plain(spec)
    if not is_valid(spec):
        # What only a rule across keys forbids: rather a smaller spec than none.
        spec = {group: value for group, value in spec.items() if group in ("cluster", "recovery", "schedule")}
        spec = {"data": {"remoteUri": "s3://rows"}, "artifacts": {"uri": "s3://models"}, **spec}
        _mend(spec, 1)
    assume(is_valid(spec))
    return spec


def _mend(spec: Spec, num_microbatches: int) -> None:
    """What only rules across keys say."""
    data, model, training = spec["data"], spec.get("model", {}), spec.setdefault("training", {})
    for key in sorted(data.get("validation", {}))[1:]:
        del data["validation"][key]
    data["format"] = {"dpo": "preference", "pretrain": "text"}.get(spec.get("method", {}).get("type"), "messages")
    data.pop("columns", None)
    for key in ("dModel", "nLayers", "nHeads"):
        model.pop(key, None)
    if "maxSteps" in training:
        training.pop("epochs", None)
    if spec.get("deepspeed", {}).get("offload") == "all":
        spec["deepspeed"]["zeroStage"] = 3
    for rule in spec.get("recovery", {}).get("rules", []):
        rule["exitCodes"] = rule.get("exitCodes") or [1]
    for volume in spec.get("cluster", {}).get("volumes", []):
        volume["claim"] = "rows"
        volume.pop("configMap", None)
    cluster = spec.get("cluster", {})
    for toleration in cluster.get("tolerations", []):
        if toleration.get("operator") == "Exists":
            toleration.pop("value", None)
        else:
            toleration.setdefault("key", "team")
    if extended := cluster.get("resources", {}).get("extended"):
        cluster["resources"]["extended"] = {key: count for key, count in extended.items() if "/" in key}
    world = cluster.get("numNodes", 1) * max(1, cluster.get("gpusPerNode", 0))
    given = [training.get(key) for key in ("microbatchSizePerGpu", "gradAccumulationSteps")]
    training["globalBatchSize"] = world * num_microbatches
    for number in given:
        if isinstance(number, int):
            training["globalBatchSize"] *= number
    if all(isinstance(number, int) for number in given):
        training["globalBatchSize"] //= num_microbatches


def _make_plain(spec: Spec) -> None:
    spec["artifacts"] = {**spec.get("artifacts", {}), "uri": "s3://models"}
    spec["data"] = {**spec["data"], "remoteUri": "s3://rows", "validation": {}}
    for group in ("artifacts", "data"):
        spec[group].pop("storage", None)
    schedule = spec.get("schedule", {})
    for key in ("runtime", "queueName", "managedBy"):
        schedule.pop(key, None)
    cluster = spec.get("cluster", {})
    cluster.pop("minNodes", None)
    for toleration in cluster.get("tolerations", []):
        toleration.setdefault("key", "team")


def is_valid(spec: Spec) -> bool:
    try:
        JobSpec.model_validate(spec)
    except ValidationError:
        return False
    return True


@st.composite
def changed(draw: st.DrawFn, spec: Spec, leaf: Path) -> Spec:
    """The spec with that leaf set to another value than it has."""
    out = copy.deepcopy(spec)
    top = _node(leaf[: leaf.index("[]")] if "[]" in leaf else leaf)
    *groups, key = leaf[: leaf.index("[]")] if "[]" in leaf else leaf
    inside = out
    for group in groups:
        inside = inside.setdefault(group, {})
    if "[]" not in leaf:
        inside[key] = draw(values(top, leaf).filter(lambda value: value != inside.get(key)))
        return out
    where = leaf[: leaf.index("[]") + 1]
    item = draw(values(top["items"], where))
    name = leaf[len(where)]
    item[name] = draw(values(top["items"]["properties"][name], leaf))
    inside[key] = [*inside.get(key, []), item]
    return out


def _node(path: Path) -> Mapping[str, Any]:
    node: Mapping[str, Any] = SCHEMA
    for key in path:
        node = node["properties"][key]
    return node


def settings_of(**more: Any) -> settings:
    """A real cluster does not give the same answer twice: what failed is shown as it failed."""
    return settings(
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )
