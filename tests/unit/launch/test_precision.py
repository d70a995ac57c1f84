"""bf16 is used where a processor or a GPU has it, and never emulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexa_train import provenance
from nexa_train.config import Job
from nexa_train.launch.node import usable_precision

X86 = "processor : 0\nmodel name : Some CPU @ 2 GHz\nflags : fpu {}\n"


def job(gpus: int = 0, **training: Any) -> Job:
    spec = {"data": {"remote_uri": "x"}, "training": training, "cluster": {"gpus_per_node": gpus}}
    return Job.model_validate({"metadata": {"name": "a"}, "spec": spec})


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (X86.format("avx2 avx512f"), False),
        (X86.format("avx2 avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile"), True),
        ("processor : 0\nFeatures : fp asimd bf16\n", True),
        ("processor : 0\nFeatures : fp asimd\n", False),
        (None, False),
    ],
)
def test_a_processor_says_whether_it_has_bf16_units(cpuinfo: Path, text: str | None, has: bool) -> None:
    if text is not None:
        cpuinfo.write_text(text)
    assert provenance.has_bf16_units() is has


def test_bf16_on_a_processor_without_it_becomes_fp32_and_is_said(
    cpuinfo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpuinfo.write_text(X86.format("avx2"))
    assert usable_precision(job(precision="bf16")) == "fp32"
    said = capsys.readouterr().err
    assert (
        said
        == "nexa: training.precision: fp32 instead of bf16, for which this processor (Some CPU @ 2 GHz) has no units\n"
    )


def test_what_can_be_done_is_done_as_asked(cpuinfo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpuinfo.write_text(X86.format("avx2"))
    assert usable_precision(job(precision="fp32")) == "fp32"
    assert usable_precision(job(gpus=1, precision="bf16")) == "bf16"
    cpuinfo.write_text(X86.format("amx_bf16"))
    assert usable_precision(job(precision="bf16")) == "bf16"
    assert capsys.readouterr().err == ""
