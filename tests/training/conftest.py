"""What really trains: tiny models, real backends, the whole launcher in a process of its own where ranks matter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.harness import Runs, write_pairs, write_rows


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, shared by the tests of this folder and by nobody else."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of questions and answers."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of preferences."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture
def runs(cache: Path, rows: Path, tmp_path: Path) -> Runs:
    """Starts `nexa run` on jobs over `rows`."""
    return Runs(cache, rows, tmp_path)
