"""The recipes really train, given weights: a small model of Falcon-3's kind in a local folder stands in for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.paths import REPOSITORY

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def falcon_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Architecture, files and chat template as a published model has them; fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nexa_train.models.locate import TINY_TOKENIZER

    folder = tmp_path_factory.mktemp("falcon")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(folder)
    for file in TINY_TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def train_py(*arguments: str, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """`python nexa_train/train.py ...`, in an empty folder."""
    command = [sys.executable, str(REPOSITORY / "nexa_train" / "train.py"), *arguments]
    environment = {**os.environ, "NEXA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_v1_trains_falcon_with_qlora_from_a_local_folder(
    falcon_folder: Path, rows: Path, cache: Path, tmp_path: Path
) -> None:
    seed = ["--config-mode", "v1", "--run-name", "falcon3-sft-v1", "--model-size", "small", "--dataset", str(rows)]
    done = train_py(*seed, "--set", f"model.name={falcon_folder}", folder=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "verified: " in done.stdout
    assert next(tmp_path.glob("artifacts/checkpoints/default-falcon3-sft-v1-*"))


def test_v1_without_weights_says_what_is_missing_and_how_to_give_it(rows: Path, cache: Path, tmp_path: Path) -> None:
    seed = ["--config-mode", "v1", "--run-name", "falcon3-sft-v1", "--model-size", "small", "--dataset", str(rows)]
    done = train_py(*seed, folder=tmp_path, cache=cache)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "tiiuae/Falcon3-3B-Instruct" in line
    assert "--set model.name=FOLDER" in line
