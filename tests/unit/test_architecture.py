"""Who may import whom, and what must not be imported too early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"


def loaded(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement, in a fresh Python."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_import_contract_holds() -> None:
    done = subprocess.run([LINT_IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_the_operators_folder_is_no_package() -> None:
    # It would hide the standard library's `operator` from whatever runs in the checkout.
    assert not (ROOT / "operator" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "nexa_train",
        "nexa_train.config.load, nexa_train.plan, nexa_train.train",
        "nexa_train.entrypoint, nexa_train.launch.slurm, nexa_train.data.prepare, nexa_train.cli.run",
    ],
    ids=["package", "planning", "launching"],
)
def test_torch_is_loaded_in_a_rank_only(module: str) -> None:
    assert not loaded(f"import {module}") & {"torch", "transformers", "kubernetes", "kopf"}
