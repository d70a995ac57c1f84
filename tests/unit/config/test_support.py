"""What no backend would honour is refused by name before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.config.support import METHODS, TUNINGS, check_supported, without_meaning
from nexa_train.errors import ConfigError
from tests.unit.config.builders import spec

LORA = {"type": "lora", "rank": 4}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "flash attention": ({"model": {"attn": "flash"}}, "model.attn: flash is not built into this version"),
    "a name beside sizes": (
        {"model": {"name": "falcon3-1b", "d_model": 64, "n_layers": 1, "n_heads": 2}},
        "model: d_model, n_layers and n_heads build a new model, so name falcon3-1b would not be read",
    ),
    "validation on gs": (
        {"data": {"validation": {"uri": "gs://b/rows.jsonl"}}},
        "gs:// is not built into this version",
    ),
    "a backend of another version": ({"backend": "deepspeed"}, "backend: deepspeed is not built into this version; av"),
    "axolotl": ({"backend": "axolotl"}, "backend: axolotl is not built into this version; available are fsdp, hf"),
    "dpo": (
        {"method": {"type": "dpo"}, "data": {"format": "preference"}},
        "method.type: dpo is not available on backend fsdp, which takes sft, pretrain",
    ),
    "pretrain on hf": (
        {"method": {"type": "pretrain"}, "data": {"format": "text"}, "backend": "hf"},
        "method.type: pretrain is not available on backend hf, which takes sft",
    ),
    "qlora on fsdp": (
        {"tuning": {"type": "qlora", "rank": 4}},
        "tuning.type: qlora is not available on backend fsdp, which takes full, lora",
    ),
    "several ranks on hf": ({"backend": "hf", "cluster": {"num_nodes": 2}}, "backend: hf runs one rank"),
    "packing on hf": ({"backend": "hf", "data": {"packing": True}}, "data.packing: not available on backend hf"),
    "bf16 on CPU": ({"training": {"precision": "bf16"}}, "training.precision: bf16 on CPU"),
    "a tracker": ({"trackers": ["wandb", "mlflow"]}, "trackers: wandb, mlflow are not built into this version"),
    "data in gs": ({"data": {"remote_uri": "gs://a/b"}}, "gs:// is not built into this version; use s3:// or a folder"),
    "artifacts in gs": ({"artifacts": {"uri": "gs://a/b"}}, "gs:// is not built into this version"),
    "a column that the format has not": (
        {"data": {"format": "prompt_completion", "columns": {"promt": "question"}}},
        "data.columns: format prompt_completion has no promt; it has prompt, completion",
    ),
    "elasticity": ({"cluster": {"min_nodes": 1}}, "cluster.min_nodes: elastic training is not built into this version"),
}


@pytest.mark.parametrize(("groups", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_honoured_is_refused_by_name(groups: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_supported(spec(**groups))
    assert str(caught.value).startswith(expected)


def test_everything_that_is_not_supported_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_supported(spec(trackers=["wandb"], training={"precision": "bf16"}, tuning={"type": "qlora", "rank": 4}))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "tuning.type",
        "training.precision",
        "trackers",
    ]


@pytest.mark.parametrize(
    ("backend", "method", "tuning"),
    [(backend, method, tuning) for backend in METHODS for method in METHODS[backend] for tuning in TUNINGS[backend]],
)
def test_every_pair_that_a_backend_claims_is_let_through(backend: str, method: str, tuning: str) -> None:
    form = "text" if method == "pretrain" else "messages"
    tuned = {"type": tuning} | ({} if tuning == "full" else {"rank": 4})
    check_supported(spec(backend=backend, method={"type": method}, tuning=tuned, data={"format": form}))


def test_bf16_is_let_through_on_a_gpu() -> None:
    check_supported(spec(training={"precision": "bf16"}, cluster={"gpus_per_node": 1}))


def test_keys_that_mean_nothing_in_a_place_are_named_where_they_are_stated() -> None:
    job = spec(cluster={"labels": {"team": "a"}}, schedule={"suspend": True, "queue_name": "night"}, image="i:1")
    assert without_meaning(job, "here") == ["cluster.labels", "image", "schedule.suspend", "schedule.queue_name"]
    assert without_meaning(job, "slurm") == ["cluster.labels", "image", "schedule.suspend"]
    assert without_meaning(spec(), "here") == []
