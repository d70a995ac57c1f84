"""Known models: their sizes are those of the weights that are published."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.models.locate import sizes_of
from nexa_train.registry import MODELS, SIZES, Architecture, family, scratch

KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
# Of each model's published config.json, by those keys; None: that file leaves it out.
CONFIGS: dict[str, tuple[Any, ...]] = {
    "falcon3-1b": ("llama", 2048, 18, 8, 4, 256, 8192, 131072, False, 8192),
    "falcon3-3b": ("llama", 3072, 22, 12, 4, 256, 9216, 131072, False, 32768),
    "falcon3-7b": ("llama", 3072, 28, 12, 4, 256, 23040, 131072, False, 32768),
    "falcon3-10b": ("llama", 3072, 40, 12, 4, 256, 23040, 131072, False, 32768),
    "falcon3-1b-base": ("llama", 2048, 18, 8, 4, 256, 8192, 131072, False, 4096),
    "falcon3-3b-base": ("llama", 3072, 22, 12, 4, 256, 9216, 131072, False, 32768),
    "falcon3-7b-base": ("llama", 3072, 28, 12, 4, 256, 23040, 131072, False, 32768),
    "falcon3-10b-base": ("llama", 3072, 40, 12, 4, 256, 23040, 131072, False, 32768),
    "smollm2-135m": ("llama", 576, 30, 9, 3, None, 1536, 49152, True, 8192),
    "smollm2-360m": ("llama", 960, 32, 15, 5, None, 2560, 49152, True, 8192),
    "smollm2-1.7b": ("llama", 2048, 24, 32, 32, None, 8192, 49152, True, 8192),
    "llama-3-8b": ("llama", 4096, 32, 32, 8, None, 14336, 128256, False, 8192),
    "llama-3-70b": ("llama", 8192, 80, 64, 8, None, 28672, 128256, False, 8192),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 8, None, 14336, 128256, False, 131072),
    "llama-3.1-70b": ("llama", 8192, 80, 64, 8, None, 28672, 128256, False, 131072),
    "llama-3.2-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 131072),
    "llama-3.2-3b": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 131072),
    "llama-3.3-70b-instruct": ("llama", 8192, 80, 64, 8, None, 28672, 128256, False, 131072),
    "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, None, 4864, 151936, True, 32768),
    "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, None, 8960, 151936, True, 131072),
    "qwen2.5-3b": ("qwen2", 2048, 36, 16, 2, None, 11008, 151936, True, 32768),
    "qwen2.5-7b": ("qwen2", 3584, 28, 28, 4, None, 18944, 152064, False, 131072),
    "qwen2.5-14b": ("qwen2", 5120, 48, 40, 8, None, 13824, 152064, False, 131072),
    "qwen2.5-32b": ("qwen2", 5120, 64, 40, 8, None, 27648, 152064, False, 131072),
    "qwen2.5-72b": ("qwen2", 8192, 80, 64, 8, None, 29568, 152064, False, 131072),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 40960),
    "qwen3-1.7b": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True, 40960),
    "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, 40960),
    "qwen3-8b": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 40960),
    "qwen3-14b": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 40960),
    "qwen3-32b": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 40960),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, None, 14336, 32768, False, 32768),
    "gemma-2b": ("gemma", 2048, 18, 8, 1, 256, 16384, 256000, None, 8192),
    "gemma-7b": ("gemma", 3072, 28, 16, 16, 256, 24576, 256000, None, 8192),
    "gemma-2-2b": ("gemma2", 2304, 26, 8, 4, 256, 9216, 256000, None, 8192),
    "gemma-2-9b": ("gemma2", 3584, 42, 16, 8, 256, 14336, 256000, None, 8192),
    "gemma-2-27b": ("gemma2", 4608, 46, 32, 16, 128, 36864, 256000, None, 8192),
    "gemma-3-270m": ("gemma3_text", 640, 18, 4, 1, 256, 2048, 262144, None, 32768),
    "gemma-3-1b": ("gemma3_text", 1152, 26, 4, 1, 256, 6912, 262144, None, 32768),
}
# Where an instruction-tuned model's file says another length than its base's.
INSTRUCT_LENGTHS = dict.fromkeys((f"qwen2.5-{size}-instruct" for size in ("1.5b", "7b", "14b", "32b", "72b")), 32768)

# What the hub shows of each model's published weights.
PUBLISHED = {
    "falcon3-1b": 1_669_408_768,
    "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464,
    "falcon3-10b": 10_305_653_760,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b-instruct": 70_553_706_496,
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


def published(name: str) -> dict[str, Any]:
    """The published config.json of a known model, as far as it decides sizes and length."""
    found = dict(zip(KEYS, CONFIGS.get(name) or CONFIGS[name.removesuffix("-instruct")], strict=True))
    found["max_position_embeddings"] = INSTRUCT_LENGTHS.get(name, found["max_position_embeddings"])
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.hub_id])
def test_a_known_model_is_what_its_published_configuration_says(name: str) -> None:
    assert MODELS[name].architecture == sizes_of(published(name))
    assert MODELS[name].max_seq_len == published(name)["max_position_embeddings"]


def test_no_two_names_mean_the_same_weights() -> None:
    hubs = [entry.hub_id for entry in MODELS.values()]
    assert len(set(hubs)) == len(hubs)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_known_model_has_exactly_the_parameters_of_its_published_weights(name: str, parameters: int) -> None:
    assert MODELS[name].architecture.num_parameters == parameters


def test_every_known_model_is_among_those() -> None:
    known = {entry.architecture for entry in MODELS.values() if entry.hub_id}
    assert known == {MODELS[name].architecture for name in PUBLISHED}


def test_an_instruction_tuned_model_has_the_sizes_of_its_base_and_another_place() -> None:
    instruct = [name for name in MODELS if name.endswith("-instruct")]
    instruct.remove("llama-3.3-70b-instruct")  # was published without a base
    for name in instruct:
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
