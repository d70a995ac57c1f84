"""Known models: their sizes are those of the weights that are published."""

from __future__ import annotations

import pytest

from nexa_train.registry import MODELS, SIZES, Architecture, family, scratch

# What the hub shows of each model's published weights.
PUBLISHED = {
    "falcon3-1b": 1_669_408_768,
    "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464,
    "falcon3-10b": 10_305_653_760,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_known_model_has_exactly_the_parameters_of_its_published_weights(name: str, parameters: int) -> None:
    assert MODELS[name].architecture.num_parameters == parameters


def test_every_known_model_is_among_those() -> None:
    known = {entry.architecture for entry in MODELS.values() if entry.hub_id}
    assert known == {MODELS[name].architecture for name in PUBLISHED}


def test_an_instruction_tuned_model_has_the_sizes_of_its_base_and_another_place() -> None:
    for name in [name for name in MODELS if name.endswith("-instruct")]:
        base, tuned = MODELS[name.removesuffix("-instruct")], MODELS[name]
        assert base.architecture == tuned.architecture
        assert base.hub_id != tuned.hub_id


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
