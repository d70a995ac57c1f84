"""What `nexa plan --show-backend-config` says of the objects that the hf backend makes is what it makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nexa_train.backend_config.trl import hf_config
from tests.training.ranks import job, make_context

pytestmark = pytest.mark.training

ADAMW = {"lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
LORA = {"type": "lora", "rank": 4, "alpha": 6.0, "dropout": 0.1}


def made(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The backend of a job, set up; and what is shown of it."""
    from nexa_train.backends import make_backend

    context = make_context({**values, "backend": "hf"})
    backend: Any = make_backend(context)
    backend.setup()
    return backend, hf_config(context.spec, context.plan)


def assert_adapters(backend: Any, shown: dict[str, Any]) -> None:
    from peft import LoraConfig
    from torch import nn

    lora, given = backend.lora, LoraConfig(**shown["peft_config"])
    if given.target_modules == "all-linear":
        linear = {name.split(".")[-2] for name, module in backend.causal.named_modules() if ".base_layer" in name}
        assert set(lora.target_modules) == linear
        assert isinstance(backend.causal.lm_head, nn.Linear), "the head has no adapter"
        given.target_modules = lora.target_modules
    assert {**given.to_dict(), "base_model_name_or_path": None} == {**lora.to_dict(), "base_model_name_or_path": None}


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]], ids=["all", "some"])
def test_optimiser_and_adapters_are_made_as_shown(rows: Path, targets: list[str]) -> None:
    backend, shown = made(job(rows, optimizer=ADAMW, tuning={**LORA, "target_modules": targets}))
    assert_adapters(backend, shown)
    [group] = backend.optimizer.param_groups  # adapters are matrices
    optimizer = shown["optimizer"]
    assert (group["lr"], list(group["betas"]), group["eps"]) == (optimizer["lr"], optimizer["betas"], optimizer["eps"])
    assert group["weight_decay"] == optimizer["weight_decay"]["matrices"]


def test_vectors_decay_as_shown_with_both_optimisers(rows: Path) -> None:
    for name in ("adamw", "adafactor"):
        backend, shown = made(job(rows, optimizer={"name": name, "lr": 0.01, "weight_decay": 0.1}))
        matrices, vectors = backend.optimizer.param_groups
        decay = {"matrices": matrices["weight_decay"], "vectors": vectors["weight_decay"]}
        assert shown["optimizer"]["weight_decay"] == decay
        assert type(backend.optimizer).__name__.lower() == shown["optimizer"]["name"] == name


def test_weights_are_quantised_as_shown(rows: Path, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    from nexa_train.models.build import build_model

    context = make_context(job(rows, model={"d_model": 64}, backend="hf"))
    folder = shutil.copytree(context.located.folder, tmp_path / "model")
    build_model(context.spec, context.located, context.tokenizer).save_pretrained(folder)
    model = {"d_model": None, "n_layers": None, "n_heads": None, "name": str(folder)}
    backend, shown = made(job(rows, model=model, tuning={**LORA, "type": "qlora", "double_quant": False}))
    assert_adapters(backend, shown)
    given = BitsAndBytesConfig(**shown["quantization_config"])
    assert backend.causal.config.quantization_config.to_dict() == given.to_dict()
