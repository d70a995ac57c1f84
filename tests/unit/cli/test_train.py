"""The command line of the first days: its flags mean what they meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexa_train.__main__ import guarded
from nexa_train.train import main
from tests.unit.data.builders import chat, jsonl

ROOT = Path(__file__).parents[3]
MULTI_NODE = ("--config-mode", "v3", "--nodes", "4", "--gpus-per-node", "8", "--global-batch", "1024")


def train(
    *arguments: str | Path, path: Path | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python nexa_train/train.py ...`, offline, with a cache of its own; `path`: where programs are found."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if home is not None:
        environment |= {"HF_HOME": str(home / "hub"), "NEXA_CACHE": str(home / "cache")}
    if path is not None:
        environment["PATH"] = str(path)
    command = [sys.executable, "nexa_train/train.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "train.jsonl", *(chat(("user", f"{n}?"), ("assistant", f"Yes, {n}.")) for n in range(100)))


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    """A folder with an sbatch that keeps what it is given and answers with a number."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\n/bin/cat > "{folder}/script"\necho 4711\n')
    (folder / "sbatch").chmod(0o755)
    return folder


def test_a_dry_run_of_a_recipe_checks_everything_and_trains_nothing(tmp_path: Path) -> None:
    done = train("--config-mode", "v1", "--dry-run", "true", home=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("configuration     valid, run id default-falcon3-qlora-")
    assert last == "dry run           nothing was trained"
    assert not (ROOT / "artifacts" / "checkpoints" / first.split()[-1]).exists()


def test_name_size_and_dataset_are_taken_from_the_flags(tmp_path: Path, dataset: Path) -> None:
    flags = ("--config-mode", "v1", "--run-name", "mine", "--model-size", "small", "--dataset", dataset)
    done = train(*flags, "--dry-run", "true", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run id default-mine-" in done.stdout
    assert "100 rows can be read" in done.stdout
    assert "weights of tiiuae/Falcon3-3B-Instruct are not on this machine" in done.stdout


def test_a_dry_run_with_a_tokenizer_counts_tokens(tmp_path: Path, dataset: Path) -> None:
    flags = ("--config-mode", "v1", "--dataset", dataset, "--set", "model.name=tiny", "--set", "tuning={type: full}")
    done = train(*flags, "--dry-run", "true", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train data        98 rows, 98 sequences, " in done.stdout
    assert "validation data   2 rows, 2 sequences, " in done.stdout


def test_without_the_weights_training_ends_with_3_and_says_how_to_give_them(tmp_path: Path, dataset: Path) -> None:
    flags = ("--config-mode", "v1", "--run-name", "mine", "--model-size", "small", "--dataset", dataset)
    done = train(*flags, "--set", f"artifacts.uri={tmp_path}/models", home=tmp_path)
    assert done.returncode == 3
    assert "give a local folder with --set model.name=FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_finds_a_broken_row_without_the_model(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "train.jsonl", chat(), {"text": "no messages"})
    done = train("--config-mode", "v1", "--dataset", rows, "--dry-run", "true", home=tmp_path)
    assert done.returncode == 5
    assert "train.jsonl row 2: no column 'messages' for format messages" in done.stderr


def test_several_nodes_without_slurm_give_the_plan_and_the_script(tmp_path: Path) -> None:
    done = train(*MULTI_NODE, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ranks             32 = 4 nodes x 8" in done.stdout
    assert "1024 sequences = " in done.stdout
    assert "there is no sbatch on this machine" in done.stdout
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8"} <= set(done.stdout.splitlines())


def test_several_nodes_with_slurm_are_submitted_and_the_number_is_reported(sbatch: Path) -> None:
    done = train(*MULTI_NODE, "--run-name", "mine", path=sbatch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "submitted mine to Slurm as job 4711; its log is mine-4711.log"
    assert "#SBATCH --nodes=4\n" in (sbatch / "script").read_text()


def test_what_slurm_refuses_ends_with_4_in_its_words(sbatch: Path) -> None:
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    done = train(*MULTI_NODE, path=sbatch)
    assert done.returncode == 4
    assert done.stderr == "nexa: error: sbatch refused falcon3-full: sbatch: error: no such partition\n"


WRONG = {
    "a size that the family has not": (
        ("--config-mode", "v1", "--model-size", "huge"),
        "--model-size huge: recipe v1 knows mini, small, medium, large",
    ),
    "a batch that the ranks cannot share": (
        ("--config-mode", "v3", "--nodes", "4", "--gpus-per-node", "8", "--global-batch", "100"),
        "training.global_batch_size 100 is not divisible by the 32 ranks",
    ),
    "a number of nodes out of bounds": (("--config-mode", "v3", "--nodes", "0"), "cluster.num_nodes: got 0; expected"),
    "an unknown recipe": (("--config-mode", "v9"), "--config-mode v9: no such recipe; shipped are"),
}


@pytest.mark.parametrize(("flags", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_ends_with_2(flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: main([*flags])) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config-mode", "v1", "--dry-run", "maybe"], "'maybe', expected true or false"),
        (["--config-mode", "v3", "--nodes", "four"], "--nodes: invalid int value: 'four'"),
        ([], "required: --config-mode"),
    ],
    ids=["neither true nor false", "a word for a number", "no recipe"],
)
def test_wrong_usage_ends_with_2(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
