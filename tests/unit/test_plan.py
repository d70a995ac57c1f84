"""Everything about a run that is decided before a rank starts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_train.errors import ConfigError
from nexa_train.plan import GIB, TrainPlan, estimate_checkpoint, estimate_memory, make_plan, parse_quantity
from nexa_train.registry import MODELS
from tests.unit.config.builders import spec

TINY = MODELS["tiny"].architecture
FALCON_1B = MODELS["falcon3-1b"].architecture
LORA = {"type": "lora", "rank": 16}
QLORA = {"type": "qlora", "rank": 16}


def plan(*, microbatch: int | None = None, threads: int = 4, sequences: int | None = None, **groups: Any) -> TrainPlan:
    return make_plan(spec(**groups), architecture=TINY, threads=threads, num_sequences=sequences, microbatch=microbatch)


SHAPES: dict[str, tuple[dict[str, Any], int, tuple[int, int, int]]] = {
    "one rank takes all": ({}, 8, (1, 8, 1)),
    "accumulation fills what the microbatch leaves": ({"microbatch_size_per_gpu": 2}, 8, (1, 2, 4)),
    "the microbatch fills what accumulation leaves": ({"grad_accumulation_steps": 4}, 8, (1, 2, 4)),
    "two nodes share": ({"microbatch_size_per_gpu": 2, "nodes": 2}, 8, (2, 2, 2)),
    "GPUs share": ({"grad_accumulation_steps": 1, "gpus": 4, "nodes": 2}, 16, (8, 2, 1)),
}


@pytest.mark.parametrize(("given_", "batch", "shape"), SHAPES.values(), ids=SHAPES)
def test_a_step_is_microbatch_times_accumulation_times_ranks(
    given_: dict[str, Any], batch: int, shape: tuple[int, int, int]
) -> None:
    sizes = dict(given_)
    cluster = {"num_nodes": sizes.pop("nodes", 1), "gpus_per_node": sizes.pop("gpus", 0)}
    found = plan(cluster=cluster, training={"global_batch_size": batch, **sizes})
    assert (found.world_size, found.microbatch, found.accumulation) == shape


@given(batch=st.integers(1, 256), nodes=st.integers(1, 8), memory=st.sampled_from(["1Mi", "64Mi", "512Mi", "8Gi"]))
def test_whatever_auto_chooses_multiplies_out(batch: int, nodes: int, memory: str) -> None:
    found = plan(
        training={"global_batch_size": batch * nodes},
        cluster={"num_nodes": nodes, "resources": {"memory": memory}},
    )
    assert found.microbatch * found.accumulation * found.world_size == batch * nodes


@pytest.mark.parametrize(("too_large", "left"), [(64, 32), (32, 16), (7, 4), (2, 1)])
def test_auto_stays_below_what_ran_out_of_memory_and_the_global_batch_stays(too_large: int, left: int) -> None:
    job = spec(training={"global_batch_size": 64})
    assert make_plan(job, architecture=TINY).microbatch == 64
    found = make_plan(job, architecture=TINY, microbatch=64, too_large=too_large)
    assert (found.microbatch, found.accumulation, found.global_batch) == (left, 64 // left, 64)


def test_what_ran_out_of_memory_does_not_matter_to_a_smaller_microbatch() -> None:
    job = spec(training={"global_batch_size": 64})
    assert make_plan(job, architecture=TINY, microbatch=8, too_large=16).microbatch == 8


def test_auto_takes_the_largest_microbatch_that_fits_and_no_larger_one() -> None:
    job = spec(training={"global_batch_size": 64}, cluster={"resources": {"memory": "1Gi"}})
    chosen = make_plan(job, architecture=TINY).microbatch
    assert 1 < chosen < 64
    assert estimate_memory(job, TINY, chosen).total <= 0.8 * GIB < estimate_memory(job, TINY, 2 * chosen).total


def test_activations_are_foreseen_in_the_precision_that_the_machine_has() -> None:
    def foreseen(asked: str, has: str | None) -> TrainPlan:
        return make_plan(spec(training={"precision": asked}), architecture=TINY, precision=has)

    assert foreseen("bf16", "fp32") == foreseen("fp32", None)
    assert foreseen("bf16", "bf16").memory != foreseen("bf16", "fp32").memory


def test_auto_takes_one_where_nothing_fits_or_the_sizes_are_unknown() -> None:
    assert plan(cluster={"resources": {"memory": "1Ki"}}).microbatch == 1
    assert make_plan(spec(), architecture=None).microbatch == 1


def test_the_microbatch_that_a_run_began_with_stays() -> None:
    assert (plan(microbatch=2).microbatch, plan(microbatch=2).accumulation) == (2, 4)


def test_a_microbatch_that_is_given_is_not_replaced_by_the_one_before() -> None:
    assert plan(microbatch=2, training={"microbatch_size_per_gpu": 4}).microbatch == 4


@pytest.mark.parametrize(("began_with", "nodes", "left"), [(4, 4, 2), (8, 2, 4), (3, 1, 2), (5, 8, 1)])
def test_with_more_ranks_the_microbatch_that_a_run_began_with_shrinks_to_what_divides(
    began_with: int, nodes: int, left: int
) -> None:
    found = plan(microbatch=began_with, cluster={"num_nodes": nodes})
    assert (found.microbatch, found.accumulation * nodes * left) == (left, 8)


LENGTHS: dict[str, tuple[dict[str, float], int | None, int | None, int | None]] = {
    "steps as given": ({"max_steps": 5}, 100, 5, 40),
    "steps without data": ({"max_steps": 5}, None, 5, 40),
    "one epoch where nothing is said": ({}, 16, 2, 16),
    "an epoch ends in a partial step": ({"epochs": 1}, 17, 3, 17),
    "part of an epoch": ({"epochs": 0.5}, 20, 2, 10),
    "several epochs": ({"epochs": 3}, 10, 4, 30),
    "at least one sequence": ({"epochs": 0.001}, 10, 1, 1),
    "epochs without data": ({"epochs": 1}, None, None, None),
}


@pytest.mark.parametrize(("training", "sequences", "steps", "total"), LENGTHS.values(), ids=LENGTHS)
def test_a_run_is_as_long_as_its_steps_or_its_epochs(
    training: dict[str, float], sequences: int | None, steps: int | None, total: int | None
) -> None:
    found = plan(training=training, sequences=sequences)
    assert (found.total_steps, found.total_sequences) == (steps, total)


def test_the_job_s_threads_win_over_the_machine_s() -> None:
    assert plan(threads=6).threads == 6
    assert plan(cluster={"threads_per_rank": 3}, threads=6).threads == 3


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("500m", 0.5), ("1.5k", 1500), ("1Ki", 1024), ("4Gi", 4 * GIB), ("1T", 1e12), ("2Ti", 2 << 40)],
)
def test_a_quantity_is_read_as_kubernetes_reads_it(text: str, number: float) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "Gi", "4GB", "-1", "1e3", "4 Gi", "1.", "0x1"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a quantity; expected a number with a unit such as 500m or 4Gi"):
        parse_quantity(text)


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_larger_microbatch_never_needs_less_memory(one: int, other: int) -> None:
    small, large = sorted((one, other))
    job = spec(model={"name": "falcon3-1b"})
    assert estimate_memory(job, FALCON_1B, small).total <= estimate_memory(job, FALCON_1B, large).total


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"tuning": LORA}, {}),
        ({"tuning": QLORA}, {"tuning": LORA}),
        ({"cluster": {"gpus_per_node": 8}}, {"cluster": {"gpus_per_node": 2}}),
        ({"training": {"activation_checkpointing": True}}, {}),
        ({"training": {"precision": "bf16"}}, {}),
        ({"model": {"max_seq_len": 128}}, {"model": {"max_seq_len": 512}}),
    ],
    ids=["lora than full", "qlora than lora", "sharded", "recomputed", "half precision", "short sequences"],
)
def test_what_saves_memory_is_seen_to_save_it(less: dict[str, Any], more: dict[str, Any]) -> None:
    saved, spent = (estimate_memory(spec(**groups), FALCON_1B, 8).total for groups in (less, more))
    assert saved < spent


def test_a_full_run_keeps_sixteen_bytes_a_weight_beside_activations() -> None:
    memory = estimate_memory(spec(), FALCON_1B, 1)
    assert memory.total - memory.activations == 16 * FALCON_1B.num_parameters


@pytest.mark.parametrize(
    ("change", "bytes_a_weight"),
    [
        ({"backend": "hf"}, (4, 4, 8)),
        ({"backend": "fsdp"}, (1, 1, 2)),
        ({"backend": "deepspeed", "deepspeed": {"zero_stage": 1}}, (4, 4, 3)),
        ({"backend": "deepspeed", "deepspeed": {"zero_stage": 2}}, (4, 1, 3)),
        ({"backend": "deepspeed", "deepspeed": {"zero_stage": 3}}, (1, 1, 3)),
        ({"backend": "axolotl"}, (4, 4, 8)),
        ({"backend": "axolotl", "axolotl": {"sharding": "fsdp"}}, (1, 1, 2)),
        ({"backend": "axolotl", "axolotl": {"sharding": "deepspeed"}, "deepspeed": {"zero_stage": 3}}, (1, 1, 3)),
    ],
)
def test_four_ranks_share_what_their_backend_shards(
    change: dict[str, Any], bytes_a_weight: tuple[int, int, int]
) -> None:
    memory = estimate_memory(spec(**change, cluster={"gpus_per_node": 4}), FALCON_1B, 1)
    count = FALCON_1B.num_parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(each * count for each in bytes_a_weight)


def test_a_checkpoint_is_weights_and_two_moments_of_what_is_trained() -> None:
    assert estimate_checkpoint(spec(), TINY) == 12 * TINY.num_parameters
    assert estimate_checkpoint(spec(tuning=LORA), TINY) == 12 * TINY.lora_parameters(16)


def test_dpo_takes_two_samples_a_sequence_and_its_reference_where_adapters_cannot_be_taken_off() -> None:
    pairs = {"method": {"type": "dpo"}, "data": {"format": "preference"}}
    for tuning, copies in (({"type": "full"}, 2), (LORA, 1)):
        one, two = spec(tuning=tuning), spec(tuning=tuning, **pairs)
        assert estimate_memory(two, FALCON_1B, 4).weights == copies * estimate_memory(one, FALCON_1B, 4).weights
        assert estimate_memory(two, FALCON_1B, 4).activations == estimate_memory(one, FALCON_1B, 8).activations
