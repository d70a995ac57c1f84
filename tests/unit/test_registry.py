"""Known models: their sizes are those of the weights that are published."""

from __future__ import annotations

import pytest

from nexa_train.registry import MODELS, SIZES, Architecture, family, scratch

PUBLISHED = {"falcon3-1b": 1.67e9, "falcon3-3b": 3.23e9, "falcon3-7b": 7.46e9, "falcon3-10b": 10.3e9}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_falcon_has_the_parameters_that_were_published(name: str, parameters: float) -> None:
    assert MODELS[name].architecture.num_parameters == pytest.approx(parameters, rel=0.03)


def test_smollm2_has_exactly_the_parameters_of_its_weights() -> None:
    assert MODELS["smollm2-135m-instruct"].architecture.num_parameters == 134_515_008


def test_parameters_are_counted_weight_by_weight() -> None:
    sizes = Architecture(4, 1, 2, 1, 2, 8, 10, tied_head=False)
    embeddings, queries, keys, values, output = 10 * 4, 4 * 4, 4 * 2, 4 * 2, 4 * 4
    feed_forward, norms, head = 3 * 4 * 8, 4 + 4 + 4, 10 * 4
    linear = queries + keys + values + output + feed_forward
    assert sizes.num_linear_parameters == linear
    assert sizes.num_parameters == embeddings + linear + norms + head


def test_adapters_stand_on_both_sides_of_every_linear_layer() -> None:
    sizes = Architecture(4, 2, 2, 1, 2, 8, 10, tied_head=False)
    layers = {"q": (4, 4), "k": (4, 2), "v": (4, 2), "o": (4, 4), "gate": (4, 8), "up": (4, 8), "down": (8, 4)}
    assert sizes.lora_parameters(3) == 2 * 3 * sum(into + out for into, out in layers.values())


def test_a_model_from_scratch_ties_its_head_and_rounds_its_feed_forward_up() -> None:
    made = scratch(128, 4, 4, 4096)
    assert (made.head_dim, made.n_kv_heads, made.d_ff, made.tied_head) == (32, 4, 352, True)


@pytest.mark.parametrize("name", ["falcon3", "falcon3-1b", "falcon3-10b"])
def test_every_member_knows_its_family(name: str) -> None:
    assert family(name) == "falcon3"


def test_a_model_that_comes_in_one_size_has_no_family() -> None:
    assert family("tiny") is None


def test_every_size_is_a_known_model_and_they_grow() -> None:
    for sizes in SIZES.values():
        parameters = [MODELS[name].architecture.num_parameters for name in sizes.values()]
        assert parameters == sorted(parameters)
