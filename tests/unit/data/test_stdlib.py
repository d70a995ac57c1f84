"""The data set that needs no download: the standard library's docstrings, written as for another machine."""

from __future__ import annotations

import subprocess
import sys
from itertools import groupby

import pytest

from nexa_train.config.spec import DataSpec
from nexa_train.data.read import Row, read_rows
from nexa_train.data.render import check_rows
from nexa_train.data.stdlib import MAX_CHARS, MIN_CHARS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Made once: parsing the whole library takes seconds."""
    path = tmp_path_factory.mktemp("stdlib") / "rows.jsonl"
    subprocess.run([sys.executable, "-m", "nexa_train.data.stdlib", str(path)], check=True)
    return list(read_rows(str(path)).rows())


@pytest.fixture(scope="module")
def names(rows: list[Row]) -> list[str]:
    """What each row asks about, such as json.encoder.JSONEncoder."""
    return [row.values["messages"][0]["content"].split()[-2] for row in rows]


def test_there_are_enough_rows_to_learn_from_and_each_fits_its_format(rows: list[Row]) -> None:
    assert len(rows) > 1000
    check_rows(rows, DataSpec(remote_uri="x"))


def test_a_row_is_one_question_and_one_answer(rows: list[Row]) -> None:
    assert {tuple(turn["role"] for turn in row.values["messages"]) for row in rows} == {("user", "assistant")}


def test_an_answer_is_one_short_paragraph(rows: list[Row]) -> None:
    answers = [row.values["messages"][1]["content"] for row in rows]
    assert all(MIN_CHARS <= len(answer) <= MAX_CHARS and "\n" not in answer for answer in answers)


def test_a_question_names_what_is_public_and_belongs_to_the_library(names: list[str]) -> None:
    assert "json.encoder.JSONEncoder" in names
    assert not [name for name in names if name.startswith(("test.", "site-packages.", "idlelib."))]
    assert not [name for name in names if name.rpartition(".")[2].startswith("_")]


def test_rows_stand_in_order_of_their_files(names: list[str]) -> None:
    # The file system lists them in any order; the digest of the data must not depend on it.
    modules = [module for module, _ in groupby(name.partition(".")[0] for name in names)]
    assert modules == sorted(set(modules))
