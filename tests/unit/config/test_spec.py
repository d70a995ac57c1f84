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
