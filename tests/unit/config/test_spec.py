"""Values that the schema derives, and the limits of its fields."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_train.config import JobSpec
from nexa_train.config.spec import LoraTuning
from tests.unit.config.builders import job, spec


@pytest.mark.parametrize(
    ("cluster", "per_node", "world"),
    [({}, 1, 1), ({"num_nodes": 3}, 1, 3), ({"gpus_per_node": 2}, 2, 2), ({"num_nodes": 2, "gpus_per_node": 4}, 4, 8)],
    ids=["alone", "CPU: one rank a node", "a rank a GPU", "nodes x GPUs"],
)
def test_ranks_follow_from_nodes_and_gpus(cluster: dict[str, int], per_node: int, world: int) -> None:
    found = spec(cluster=cluster, training={"global_batch_size": 24}).cluster
    assert (found.ranks_per_node, found.world_size) == (per_node, world)


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(8, None, 2.0), (8, 8, 1.0), (16, 32, 2.0), (4, 1, 0.25)], ids=str
)
def test_the_scale_of_adapters_is_alpha_by_rank(rank: int, alpha: float | None, scale: float) -> None:
    assert LoraTuning(rank=rank, alpha=alpha).scale == scale


def test_a_model_is_built_from_scratch_where_its_sizes_are_given() -> None:
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4}
    assert (spec(model=sizes).model.from_scratch, spec().model.from_scratch) == (True, False)


@pytest.mark.parametrize(
    ("validation", "enabled"), [({}, False), ({"rows": 1}, True), ({"fraction": 0.5}, True), ({"uri": "v"}, True)]
)
def test_validation_is_on_where_something_is_held_out(validation: dict[str, Any], enabled: bool) -> None:
    assert spec(data={"validation": validation}).data.validation.enabled is enabled


def test_a_spec_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().training.seed = 3


@given(
    world=st.integers(1, 64),
    batch=st.integers(1, 512),
    micro=st.none() | st.integers(1, 64),
    accumulation=st.none() | st.integers(1, 64),
)
def test_a_batch_is_accepted_exactly_where_the_ranks_can_make_it(
    world: int, batch: int, micro: int | None, accumulation: int | None
) -> None:
    def make() -> JobSpec:
        sizes = {"microbatch_size_per_gpu": micro or "auto", "grad_accumulation_steps": accumulation or "auto"}
        return spec(cluster={"num_nodes": world}, training={"global_batch_size": batch, **sizes})

    possible = any(
        world * m * a == batch
        for m in ([micro] if micro else range(1, batch + 1))
        for a in ([accumulation] if accumulation else {batch // (world * m)})
    )
    if possible:
        assert make().training.global_batch_size == batch
    else:
        with pytest.raises(ValidationError, match="global_batch_size"):
            make()


LABELS = {
    "a": True,
    "0": False,
    "a0": True,
    "a-b": True,
    "a" * 45: True,
    "a" * 46: False,
    "": False,
    "-a": False,
    "a-": False,
    "A": False,
    "a.b": False,
    "a_b": False,
    "a\n": False,
    "ä": False,
}


@pytest.mark.parametrize(("name", "valid"), LABELS.items(), ids=map(repr, LABELS))
def test_a_name_is_a_dns_label_of_at_most_45_characters(name: str, valid: bool) -> None:
    if valid:
        assert job(name).metadata.name == name
    else:
        with pytest.raises(ValidationError, match="name"):
            job(name)


KEYS = {
    "a": True, "a/b": True, "a.b-c/D_e.f": True, "x" * 63: True, "x" * 64: False, "a/" + "x" * 64: False, "A/b": False,
    "a..b/c": False, "a.-b/c": False, "-a": False, "a-": False, "a_b/c": False, "": False, "/a": False, "a/": False,
    "a/b/c": False, "a b": False, "a\n": False, "ä": False, "a/" + "b" * 60: True, f"{'a' * 252}/b": False,
}  # fmt: skip


def as_a_toleration(key: str) -> dict[str, Any]:
    return {"tolerations": [{"key": key}]}


def is_taken(**cluster: Any) -> bool:
    try:
        return bool(spec(cluster=cluster))
    except ValidationError:
        return False


@pytest.mark.parametrize(("key", "valid"), KEYS.items(), ids=[repr(key)[:20] for key in KEYS])
def test_keys_are_those_of_which_pods_can_be_made(key: str, valid: bool) -> None:
    assert is_taken(labels={key: "x"}) == valid
    assert is_taken(node_selector={key: "x"}) == valid
    assert is_taken(**as_a_toleration(key)) == valid
    # Kubernetes takes no notice of capitals in those of annotations.
    assert is_taken(annotations={key: "any text"}) == (valid or key == "A/b")


def test_a_key_that_is_none_is_named_with_its_group() -> None:
    with pytest.raises(ValidationError, match="node_selector: 'a b' is no key"):
        spec(cluster={"node_selector": {"a b": "x"}})
    assert spec(data={"columns": {"prompt": "any column"}})


@pytest.mark.parametrize(
    ("toleration", "valid"),
    [
        ({"key": "a", "operator": "Exists"}, True),
        ({"key": "a", "operator": "Exists", "value": ""}, True),
        ({"key": "a", "operator": "Exists", "value": "b"}, False),
        ({"key": "a", "value": "b"}, True),
        ({"operator": "Exists"}, True),
        ({"value": "b"}, False),
        ({}, False),
    ],
)
def test_a_toleration_is_one_of_which_a_pod_can_be_made(toleration: dict[str, str], valid: bool) -> None:
    assert is_taken(tolerations=[toleration]) == valid


DEVICES = {
    "nvidia.com/mig-3g.40gb": True, "rdma/hca": True, "gpu": False, "a..b/c": False, "a/" + "x" * 64: False,
    "kubernetes.io/x": False, "node.kubernetes.io/x": False, "requests.nvidia.com/gpu": False, "a/b\n": False,
    f"{'a' * 245}/b": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "valid"), DEVICES.items(), ids=[repr(name)[:30] for name in DEVICES])
def test_devices_are_called_as_a_plugin_may_call_them(name: str, valid: bool) -> None:
    assert is_taken(gpu_resource=name) == valid
    assert is_taken(resources={"extended": {name: 1}}) == valid


@pytest.mark.parametrize(("name", "valid"), {"a": True, "a.b-c": True, "a..b": False, "a.-b": False}.items())
def test_names_are_those_that_objects_can_have(name: str, valid: bool) -> None:
    assert is_taken(volumes=[{"name": "v", "mount_path": "/v", "claim": name}]) == valid


def test_a_queue_s_name_is_a_label_s_value() -> None:
    assert spec(schedule={"queue_name": "q" * 63})
    with pytest.raises(ValidationError, match="queue_name"):
        spec(schedule={"queue_name": "q" * 64})


@pytest.mark.parametrize("memory", ["4Gi", "500m", "1.5G", "128"])
def test_a_quantity_is_written_as_kubernetes_does(memory: str) -> None:
    assert spec(cluster={"resources": {"memory": memory}}).cluster.resources.memory == memory


@pytest.mark.parametrize("amount", ["0", "0m", "0.0Gi", "000"])
@pytest.mark.parametrize("key", ["cpu", "memory"])
def test_nothing_of_a_resource_is_refused_for_it_would_be_no_limit(key: str, amount: str) -> None:
    with pytest.raises(ValidationError, match=f"{key}: zero would be no limit at all: leave it out"):
        spec(cluster={"resources": {key: amount}})
    assert spec(cluster={"resources": {key: "0.05"}}).cluster.resources.model_dump()[key] == "0.05"


@pytest.mark.parametrize(
    "name",
    ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_IMEX_CHANNELS", "NVIDIA_MIG_CONFIG_DEVICES"],
)
def test_no_variable_gives_devices_that_were_not_asked_for(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} would give the pod devices"):
        spec(cluster={"env": [{"name": name, "value": "all"}]})
    assert spec(cluster={"env": [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}]}).cluster.env


@pytest.mark.parametrize("memory", ["4GB", "-1", "1e3", "", "4 Gi", "4Gi\n"])
def test_anything_else_is_no_quantity(memory: str) -> None:
    with pytest.raises(ValidationError, match="memory"):
        spec(cluster={"resources": {"memory": memory}})
