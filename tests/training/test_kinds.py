"""Every kind of model that has a name in the registry trains on every backend, on two ranks, to the same steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nexa_train.models.locate import TINY_TOKENIZER
from nexa_train.registry import TINY_VOCAB_SIZE
from tests.training.ranks import Trained, job, make_context, train_on_ranks

pytestmark = pytest.mark.training

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": TINY_VOCAB_SIZE}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 16},
}
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp": {"backend": "fsdp"},
    "hf": {"backend": "hf"},
    "zero 3": {"backend": "deepspeed", "deepspeed": {"zero_stage": 3}},
}


def model_folder(folder: Path, kind: str) -> Path:
    """A small random model with the shipped tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(TINY_TOKENIZER, folder)
    config = AutoConfig.for_model(kind, **SIZES, **HEADS, pad_token_id=None, **KINDS[kind])
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> dict[str, Trained]:
    """Of each kind and backend, what became of six steps on two ranks."""
    folder = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXA_CACHE", str(cache))
        jobs = {}
        for kind in KINDS:
            name = str(model_folder(folder / kind, kind))
            model = {"d_model": None, "n_layers": None, "n_heads": None, "name": name}
            for backend, chosen in BACKENDS.items():
                jobs[f"{kind}, {backend}"] = job(rows, **chosen, model=model, training={"max_steps": 6})
            make_context(jobs[f"{kind}, fsdp"])  # prepared once
        return train_on_ranks(jobs, folder / "ranks")


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_same_steps_on_every_backend(trained: dict[str, Trained], kind: str) -> None:
    expected = trained[f"{kind}, fsdp"]
    assert len(expected.losses) == 6
    assert expected.losses[-1] < expected.losses[0]
    for backend in BACKENDS:
        found = trained[f"{kind}, {backend}"]
        assert found.tokens == expected.tokens
        assert found.losses == pytest.approx(expected.losses, rel=1e-5), backend
        assert found.norms == pytest.approx(expected.norms, rel=1e-4), backend
        assert found.validation == pytest.approx(expected.validation, rel=1e-5), backend
