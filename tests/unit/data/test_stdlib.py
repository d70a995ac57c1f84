"""The data set that needs no download: the standard library's docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config.spec import DataSpec
from nexa_train.data.read import RawData, read_rows
from nexa_train.data.render import check_rows
from nexa_train.data.stdlib import MAX_CHARS, MIN_CHARS


@pytest.fixture(scope="module")
def raw() -> RawData:
    return read_rows("stdlib:docstrings")


@pytest.fixture(scope="module")
def rows(raw: RawData) -> list[dict[str, Any]]:
    return [row.values for row in raw.rows]


def test_there_are_enough_rows_to_learn_from_and_each_fits_its_format(raw: RawData) -> None:
    assert len(raw.rows) > 1000
    check_rows(raw.rows, DataSpec(remote_uri=raw.uri))


def test_an_answer_is_one_short_paragraph(rows: list[dict[str, Any]]) -> None:
    answers = [row["messages"][1]["content"] for row in rows]
    assert all(MIN_CHARS <= len(answer) <= MAX_CHARS and "\n" not in answer for answer in answers)


def test_a_question_names_what_is_public_and_belongs_to_the_library(rows: list[dict[str, Any]]) -> None:
    names = [row["messages"][0]["content"].split()[-2] for row in rows]
    assert "json.encoder.JSONEncoder" in names
    assert not [name for name in names if name.startswith(("test.", "site-packages.", "idlelib."))]
    assert not [name for name in names if name.rpartition(".")[2].startswith("_")]


def test_another_process_writes_the_same_rows_in_the_same_order(tmp_path: Path, raw: RawData) -> None:
    command = [sys.executable, "-m", "nexa_train.data.stdlib", str(tmp_path / "rows.jsonl")]
    subprocess.run(command, check=True)
    assert [row.values for row in read_rows(str(tmp_path / "rows.jsonl")).rows] == [row.values for row in raw.rows]
