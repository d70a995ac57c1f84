"""What Axolotl is given: judged by its own schema, and no key of the job left out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pydantic import ValidationError

from nexa_train.backend_config.axolotl import VERSION, axolotl_config, environment
from nexa_train.config import JobSpec
from nexa_train.errors import ConfigError
from nexa_train.launch.installed import check_installed, unmet
from nexa_train.plan import make_plan

REPOSITORY = Path(__file__).parent.parent.parent
GPU: dict[str, Any] = {"cluster": {"gpus_per_node": 2}}
LORA: dict[str, Any] = {"tuning": {"type": "lora", "rank": 4}}
QLORA: dict[str, Any] = {"tuning": {"type": "qlora", "rank": 4}}
DEEPSPEED: dict[str, Any] = GPU | {"axolotl": {"sharding": "deepspeed"}}
DPO: dict[str, Any] = {"method": {"type": "dpo"}, "data": {"remote_uri": "rows", "format": "preference"}}
JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "epochs": {"training": {"epochs": 2.0}},
    "lora": LORA,
    "lora-targets": {"tuning": {"type": "lora", "rank": 4, "target_modules": ["q_proj"], "dropout": 0.1}},
    "qlora": QLORA,
    "dpo": DPO,
    "dpo-lora": DPO | LORA,
    "dpo-qlora": DPO | QLORA,
    "two-ranks": {"cluster": {"num_nodes": 2}},
    "checkpointing": {"training": {"max_steps": 4, "activation_checkpointing": True}},
    "wsd": {"optimizer": {"scheduler": "wsd", "warmup_steps": 3, "max_grad_norm": 0}},
    "bf16": GPU | {"training": {"max_steps": 4, "precision": "bf16"}, "model": {"attn": "flash"}},
    "fsdp": GPU | {"axolotl": {"sharding": "fsdp"}},
    "fsdp-lora": GPU | LORA | {"axolotl": {"sharding": "fsdp"}},
    "deepspeed": DEEPSPEED,
    "deepspeed-offload": DEEPSPEED | {"deepspeed": {"offload": "optimizer"}},
}


def job(**change: Any) -> JobSpec:
    base = {"backend": "axolotl", "data": {"remote_uri": "rows"}, "training": {"max_steps": 10}}
    return JobSpec.model_validate({**base, **change})


def config_of(**change: Any) -> dict[str, Any]:
    spec = job(**change)
    return axolotl_config(spec, make_plan(spec))


def judged(config: dict[str, Any]) -> Any:
    """As `axolotl.utils.config.validate_config` has it judged, on an A100."""
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities

    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_80"}
    return AxolotlConfigWCapabilities(**config, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})


@pytest.mark.parametrize("change", JOBS.values(), ids=JOBS)
def test_axolotl_takes_every_key_as_it_is_given(change: dict[str, Any]) -> None:
    config = config_of(**change)
    taken = judged(config).model_dump(by_alias=True)
    for key, value in config.items():
        if isinstance(value, dict):
            assert taken[key].items() >= value.items(), key
        elif key == "datasets":
            assert taken[key][0].items() >= value[0].items()
        else:
            assert taken[key] == value, key


def test_what_axolotl_does_not_take_is_noticed() -> None:
    with pytest.raises(ValidationError, match="lora_alpha"):
        judged(config_of(**LORA) | {"lora_alpha": 1.5})
    assert "lora_alphas" not in judged(config_of() | {"lora_alphas": 1}).model_dump(by_alias=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"model": {"name": "falcon3-1b"}}),
        ({}, {"model": {"max_seq_len": 64}}),
        ({}, {"model": {"attn": "eager"}}),
        ({}, {"data": {"remote_uri": "others"}}),
        ({}, {"training": {"max_steps": 11}}),
        ({"training": {"epochs": 1.0}}, {"training": {"epochs": 2.0}}),
        ({}, {"training": {"max_steps": 10, "seed": 1}}),
        ({}, {"training": {"max_steps": 10, "global_batch_size": 16}}),
        ({}, {"training": {"max_steps": 10, "microbatch_size_per_gpu": 2}}),
        ({}, {"training": {"max_steps": 10, "activation_checkpointing": True}}),
        (GPU, GPU | {"training": {"max_steps": 10, "precision": "bf16"}}),
        ({}, {"optimizer": {"lr": 0.1}}),
        ({}, {"optimizer": {"weight_decay": 0.1}}),
        ({}, {"optimizer": {"betas": [0.8, 0.999]}}),
        ({}, {"optimizer": {"betas": [0.9, 0.99]}}),
        ({}, {"optimizer": {"eps": 1e-6}}),
        ({}, {"optimizer": {"scheduler": "linear"}}),
        ({}, {"optimizer": {"warmup_steps": 3}}),
        ({}, {"optimizer": {"max_grad_norm": 0.0}}),
        (DPO, DPO | {"method": {"type": "dpo", "beta": 0.5}}),
        ({}, LORA),
        (LORA, QLORA),
        (LORA, {"tuning": {"type": "lora", "rank": 8, "alpha": 8}}),
        (LORA, {"tuning": {"type": "lora", "rank": 4, "alpha": 4}}),
        (LORA, {"tuning": {"type": "lora", "rank": 4, "dropout": 0.1}}),
        (LORA, {"tuning": {"type": "lora", "rank": 4, "target_modules": ["q_proj"]}}),
        (QLORA, {"tuning": {"type": "qlora", "rank": 4, "double_quant": False}}),
        (GPU, GPU | {"axolotl": {"sharding": "fsdp"}}),
        (GPU, GPU | {"axolotl": {"sharding": "deepspeed"}}),
        (DEEPSPEED, DEEPSPEED | {"deepspeed": {"zero_stage": 1}}),
        (DEEPSPEED, DEEPSPEED | {"deepspeed": {"offload": "optimizer"}}),
        (DEEPSPEED, DEEPSPEED | {"optimizer": {"max_grad_norm": 0.0}}),
    ],
)
def test_another_value_is_another_configuration(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert config_of(**first) != config_of(**second)


def test_a_step_is_the_global_batch() -> None:
    spec = job(
        training={"max_steps": 3, "global_batch_size": 24, "microbatch_size_per_gpu": 2}, cluster={"num_nodes": 3}
    )
    config = axolotl_config(spec, make_plan(spec))
    assert config["micro_batch_size"] * config["gradient_accumulation_steps"] * 3 == 24


def test_a_fractional_alpha_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tuning\.alpha: 2\.5"):
        config_of(tuning={"type": "lora", "rank": 4, "alpha": 2.5})


def test_flash_attention_that_would_mix_packed_samples_is_refused() -> None:
    packed: dict[str, Any] = GPU | {"model": {"attn": "flash"}, "data": {"remote_uri": "rows", "packing": True}}
    with pytest.raises(ConfigError, match=r"^model\.attn: flash .* not of 4; set training.microbatch_size_per_gpu 1"):
        config_of(**packed, training={"microbatch_size_per_gpu": 4})
    for allowed in (packed | {"training": {"microbatch_size_per_gpu": 1}}, packed | {"model": {"attn": "sdpa"}}):
        judged(config_of(**allowed))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"axolotl": {"sharding": "fsdp"}, "cluster": {"num_nodes": 2}}, "fsdp needs GPUs"),
        ({"axolotl": {"sharding": "deepspeed"}, "cluster": {"num_nodes": 2}}, "deepspeed needs GPUs"),
        ({"axolotl": {"sharding": "fsdp"}, "cluster": {"gpus_per_node": 1}}, "nothing to share out over one rank"),
        (DEEPSPEED | {"deepspeed": {"zero_stage": 3}}, "zero_stage 1 and 2"),
        (DEEPSPEED | DPO, "sft"),
        (DEEPSPEED | QLORA, "full and lora"),
        (GPU | QLORA | {"axolotl": {"sharding": "fsdp"}}, "full and lora in this version, not qlora"),
    ],
)
def test_sharding_that_would_not_be_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^axolotl.sharding: .*{told}"):
        config_of(**change)


def test_axolotl_reports_to_nobody_and_other_backends_see_nothing_of_it() -> None:
    assert environment(job())["AXOLOTL_DO_NOT_TRACK"] == "1"
    assert environment(job())["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in environment(job(**GPU))
    assert environment(job(backend="hf")) == {}


def test_outside_its_environment_axolotl_is_refused_with_what_is_missing_and_where_it_runs() -> None:
    with pytest.raises(ConfigError, match=r"lacks .*make axolotl-env.*trainer_image/heavy"):
        check_installed("axolotl")
    check_installed("fsdp")
    assert unmet("no-such-package==1") == ["no-such-package==1"]
    assert unmet("pydantic>=2") == []


def test_the_heavy_environment_pins_what_nexa_needs() -> None:
    def names(lines: list[str]) -> set[str]:
        return {Requirement(line).name.lower().replace("_", "-") for line in lines if line and line[0] != "#"}

    heavy = REPOSITORY / "trainer_image" / "heavy"
    pinned, wanted = ((heavy / name).read_text().splitlines() for name in ("constraints.txt", "requirements.txt"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"] + project["optional-dependencies"]["train"]) | names(wanted) <= names(pinned)
    assert f"axolotl=={VERSION}" in wanted
