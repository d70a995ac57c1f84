"""Every kind of model that has a name in the registry trains on every backend, on two ranks, to the same steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config.spec import JobSpec
from nexa_train.errors import ConfigError
from nexa_train.models.locate import TINY_TOKENIZER
from nexa_train.registry import TINY_VOCAB_SIZE
from tests.training.harness import Runs
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


@pytest.mark.parametrize(
    ("attn", "kind", "expected"),
    [("auto", "gemma2", "eager"), ("eager", "gemma2", "eager"), ("auto", "qwen3", "sdpa"), ("sdpa", "gemma", "sdpa")],
)
def test_preferences_on_trl_take_an_attention_that_the_model_can_have(
    tmp_path: Path, rows: Path, attn: str, kind: str, expected: str
) -> None:
    from nexa_train.models.pretrained import load_pretrained

    model = load_pretrained(preferring(rows, attn), model_folder(tmp_path / kind, kind))
    assert model.config._attn_implementation == expected


def test_an_attention_that_the_model_cannot_have_is_refused_where_it_was_asked_for(tmp_path: Path, rows: Path) -> None:
    from nexa_train.models.pretrained import load_pretrained

    with pytest.raises(ConfigError, match=r"model\.attn: sdpa takes no scores with a soft cap"):
        load_pretrained(preferring(rows, "sdpa"), model_folder(tmp_path / "gemma2", "gemma2"))


def preferring(rows: Path, attn: str) -> JobSpec:
    return JobSpec.model_validate(
        job(rows, backend="hf", method={"type": "dpo"}, data={"format": "preference"}, model={"attn": attn})
    )


def test_a_whole_model_keeps_how_its_text_is_made(tmp_path: Path, runs: Runs) -> None:
    """A cache is off while transformers trains, and tokens that end a text may stand in a file of their own."""
    folder = model_folder(tmp_path / "gemma", "gemma")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    model = {"d_model": None, "n_layers": None, "n_heads": None, "name": str(folder)}
    run = runs.make(backend="hf", model=model, training={"max_steps": 1})
    assert run.finish()["exit_code"] == 0
    [manifest] = run.manifests
    place = run.artifacts / manifest.folder
    kept = {
        entry.path: json.loads((place / entry.object).read_text()) for entry in manifest.files if "config" in entry.path
    }
    assert kept["config.json"]["use_cache"] is True
    assert kept["generation_config.json"] == {"eos_token_id": [1, 2]}
