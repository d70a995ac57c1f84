"""What TRL is given is what the job says."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.backend_config.trl import hf_config, trl_config
from nexa_train.plan import make_plan
from tests.unit.config.builders import spec


def given(**groups: Any) -> dict[str, Any]:
    job = spec(backend="hf", **groups)
    return trl_config(job, make_plan(job))


SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length": ({"training": {"max_steps": 7}}, {"max_steps": 7}),
    "length in epochs": ({"training": {"epochs": 2}}, {"max_steps": None}),
    "batch": (
        {"training": {"global_batch_size": 8, "microbatch_size_per_gpu": 2}, "cluster": {"num_nodes": 2}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "seed": ({"training": {"seed": 5}}, {"seed": 5}),
    "clipping": ({"optimizer": {"max_grad_norm": 0.5}}, {"max_grad_norm": 0.5}),
    "a GPU": ({"cluster": {"gpus_per_node": 1}}, {"use_cpu": False, "dataloader_pin_memory": True}),
    "bf16": ({"training": {"precision": "bf16"}, "cluster": {"gpus_per_node": 1}}, {"bf16": True}),
    "fp32": ({}, {"bf16": False, "use_cpu": True}),
    "recomputing": ({"training": {"activation_checkpointing": True}}, {"activation_checkpointing": True}),
    "sft": ({}, {"loss_type": "nll", "max_length": None, "packing": False}),
    "sft packed by Nexa": ({"data": {"packing": True}}, {"packing": False}),
    "dpo": (
        {"method": {"type": "dpo", "beta": 0.3}, "data": {"format": "preference"}},
        {"loss_type": ["sigmoid"], "beta": 0.3, "disable_dropout": False, "max_length": None},
    ),
}


@pytest.mark.parametrize(("groups", "expected"), SAID.values(), ids=SAID)
def test_trl_is_given_what_the_job_says(groups: dict[str, Any], expected: dict[str, Any]) -> None:
    found = given(**groups)
    assert {key: found[key] for key in expected} == expected


def test_trl_is_never_asked_to_save_or_to_report() -> None:
    found = given()
    assert {found[key] for key in ("save_strategy", "logging_strategy", "eval_strategy")} == {"no"}
    assert found["report_to"] == "none"


def shown(**groups: Any) -> dict[str, Any]:
    """What stands beside the arguments of TRL's configuration."""
    job = spec(backend="hf", **groups)
    plan = make_plan(job)
    found = hf_config(job, plan)
    assert found.items() >= trl_config(job, plan).items()
    return {key: found[key] for key in found.keys() - trl_config(job, plan).keys()}


def test_people_are_shown_the_optimiser_with_its_rates() -> None:
    optimizer = {"lr": 0.1, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.01}
    found = shown(optimizer={**optimizer, "scheduler": "wsd", "warmup_steps": 3})
    assert found == {
        "optimizer": {"name": "adamw", **optimizer, "weight_decay": {"matrices": 0.01, "vectors": 0.0}},
        "lr_scheduler": {"name": "wsd", "warmup_steps": 3},
    }
    assert shown(optimizer={"name": "adafactor"})["optimizer"].keys() == {"name", "lr", "weight_decay"}


def test_people_are_shown_adapters_and_quantisation_where_the_job_has_them() -> None:
    assert shown(tuning={"type": "lora", "rank": 4}).keys() == {"optimizer", "lr_scheduler", "peft_config"}
    found = shown(tuning={"type": "qlora", "rank": 4, "target_modules": ["q_proj"], "double_quant": False})
    assert found["peft_config"]["target_modules"] == ["q_proj"]
    assert found["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    }
