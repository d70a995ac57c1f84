"""What really trains: tiny models, real backends, the whole launcher in a process of its own where ranks matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import Runs, write_pairs, write_rows
from tests.training.nursery import Attempts, Make, Nursery


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


@pytest.fixture
def make(nursery: Nursery, runs: Runs, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes runs whose ranks come from the module's `nursery`, and which may be attempted more than once."""
    monkeypatch.setenv("NEXA_CACHE", str(cache))

    def made(**change: Any) -> Attempts:
        return Attempts(nursery, runs.make(**change), tmp_path / f"attempts-{runs.count}")

    return made
