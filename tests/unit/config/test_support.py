"""What no backend would honour is refused by name before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.config.support import METHODS, TUNINGS, check_supported, without_meaning
from nexa_train.errors import ConfigError
from tests.unit.config.builders import spec

LORA = {"type": "lora", "rank": 4}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "flash attention": ({"model": {"attn": "flash"}}, "model.attn: flash runs on GPUs alone"),
    "flash in fp32": (
        {"model": {"attn": "flash"}, "cluster": {"gpus_per_node": 1}, "training": {"precision": "fp32"}},
        "model.attn: flash takes no fp32",
    ),
    "a name beside sizes": (
        {"model": {"name": "falcon3-1b", "d_model": 64, "n_layers": 1, "n_heads": 2}},
        "model: d_model, n_layers and n_heads build a new model, so name falcon3-1b would not be read",
    ),
    "validation on gs": (
        {"data": {"validation": {"uri": "gs://b/rows.jsonl"}}},
        "gs:// is not built into this version",
    ),
    "distill": (
        {"method": {"type": "distill", "teacher": "tiny"}},
        "method.type: distill is not available on backend fsdp, which takes pretrain, sft, dpo",
    ),
    "dpo on deepspeed": (
        {"method": {"type": "dpo"}, "data": {"format": "preference"}, "backend": "deepspeed"},
        "method.type: dpo is not available on backend deepspeed, which takes pretrain, sft",
    ),
    "packed pairs": (
        {"method": {"type": "dpo"}, "data": {"format": "preference", "packing": True}},
        "data.packing: method dpo takes pairs, which are not packed",
    ),
    "preferences over Axolotl's ranks": (
        {
            "method": {"type": "dpo"},
            "data": {"format": "preference"},
            "backend": "axolotl",
            "cluster": {"num_nodes": 2},
        },
        "backend: axolotl takes method dpo on one rank alone; use backend fsdp or hf for more",
    ),
    "pretrain on hf": (
        {"method": {"type": "pretrain"}, "data": {"format": "text"}, "backend": "hf"},
        "method.type: pretrain is not available on backend hf, which takes sft, dpo",
    ),
    "qlora on fsdp": (
        {"tuning": {"type": "qlora", "rank": 4}},
        "tuning.type: qlora is not available on backend fsdp, which takes full, lora",
    ),
    "adafactor on deepspeed": (
        {"optimizer": {"name": "adafactor"}, "backend": "deepspeed"},
        "optimizer.name: adafactor is not available on backend deepspeed, which takes adamw",
    ),
    "betas of adafactor": (
        {"optimizer": {"name": "adafactor", "betas": [0.8, 0.9]}},
        "optimizer.betas: adafactor has none; leave it out",
    ),
    "adafactor over shards": (
        {"optimizer": {"name": "adafactor"}, "cluster": {"num_nodes": 2}},
        "optimizer.name: torch's adafactor takes no sharded weights; use backend hf, or adamw",
    ),
    "another backend's ZeRO": (
        {"deepspeed": {"zero_stage": 3}},
        "deepspeed: would not be read on backend fsdp; leave it out or use deepspeed",
    ),
    "ZeRO for an axolotl that does not use it": (
        {"deepspeed": {"zero_stage": 3}, "backend": "axolotl"},
        "deepspeed: would not be read on backend axolotl",
    ),
    "another backend's sharding": (
        {"axolotl": {"sharding": "fsdp"}, "backend": "hf"},
        "axolotl: would not be read on backend hf; leave it out or use axolotl",
    ),
    "a tracker": ({"trackers": ["wandb", "mlflow"]}, "trackers: wandb, mlflow are not built into this version"),
    "data in gs": ({"data": {"remote_uri": "gs://a/b"}}, "gs:// is not built into this version; use s3:// or a folder"),
    "artifacts in memory": (
        {"artifacts": {"uri": "Memory://m"}},
        "artifacts.uri: memory:// lasts as long as one process; use s3:// or a folder",
    ),
    "artifacts in gs": ({"artifacts": {"uri": "gs://a/b"}}, "gs:// is not built into this version"),
    "a column that the format has not": (
        {"data": {"format": "prompt_completion", "columns": {"promt": "question"}}},
        "data.columns: format prompt_completion has no promt; it has prompt, completion",
    ),
    "more than a process can be told": (
        {"cluster": {"env": [{"name": f"A{number}", "value": "é" * 1024} for number in range(60)]}},
        "spec: 124",
    ),
    "elasticity of a fixed shape": (
        {
            "cluster": {"num_nodes": 2, "min_nodes": 1},
            "training": {"global_batch_size": 8, "grad_accumulation_steps": 2},
        },
        "cluster.min_nodes: with grad_accumulation_steps given, fewer nodes would have to take more sequences at once",
    ),
}


@pytest.mark.parametrize(("groups", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_honoured_is_refused_by_name(groups: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_supported(spec(**groups))
    assert str(caught.value).startswith(expected)


def test_everything_that_is_not_supported_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_supported(spec(trackers=["wandb"], model={"attn": "flash"}, tuning={"type": "qlora", "rank": 4}))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "tuning.type",
        "model.attn",
        "trackers",
    ]


@pytest.mark.parametrize(
    ("backend", "method", "tuning"),
    [(backend, method, tuning) for backend in METHODS for method in METHODS[backend] for tuning in TUNINGS[backend]],
)
def test_every_pair_that_a_backend_claims_is_let_through(backend: str, method: str, tuning: str) -> None:
    form = {"pretrain": "text", "dpo": "preference"}.get(method, "messages")
    tuned = {"type": tuning} | ({} if tuning == "full" else {"rank": 4})
    check_supported(spec(backend=backend, method={"type": method}, tuning=tuned, data={"format": form}))


def test_options_of_a_backend_are_let_through_where_it_runs() -> None:
    check_supported(spec(backend="deepspeed", deepspeed={"zero_stage": 3, "offload": "all"}))
    check_supported(spec(backend="axolotl", axolotl={"sharding": "deepspeed"}, deepspeed={"zero_stage": 1}))
    check_supported(spec(model={"attn": "flash"}, cluster={"gpus_per_node": 1}, training={"precision": "bf16"}))


def test_keys_that_mean_nothing_in_a_place_are_named_where_they_are_stated() -> None:
    job = spec(cluster={"labels": {"team": "a"}}, schedule={"suspend": True, "queue_name": "night"}, image="i:1")
    assert without_meaning(job, "here") == ["cluster.labels", "image", "schedule.suspend", "schedule.queue_name"]
    assert without_meaning(job, "slurm") == ["cluster.labels", "image", "schedule.suspend"]
    assert without_meaning(spec(), "here") == []
    devices = spec(cluster={"resources": {"cpu": "2", "extended": {"rdma/hca": 1}}, "gpu_resource": "amd.com/gpu"})
    assert without_meaning(devices, "slurm") == ["cluster.gpu_resource", "cluster.resources.extended"]
