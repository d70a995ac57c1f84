"""The real command line: quick help, clean JSON, and the exit code of every error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from nexa_train import __version__, provenance
from nexa_train.__main__ import main
from nexa_train.backend_config import CONFIGS, backend_config
from nexa_train.cli.check import plan_of
from nexa_train.config.load import load_job
from nexa_train.launch.node import Node, make_ready
from nexa_train.launch.work import RankWork
from nexa_train.models.locate import TINY_TOKENIZER
from nexa_train.store import open_store
from tests.unit.artifact.builders import RUN, publish_chain

COMMANDS = ("run", "validate", "plan", "submit", "verify", "version")
JOB = "data: {remote_uri: train.jsonl}\ntraining: {max_steps: 4}\n"


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


Nexa = Callable[..., Answer]


def in_a_process(*arguments: str | Path) -> Answer:
    command = [sys.executable, "-m", "nexa_train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def nexa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nexa:
    """The command line within this process, which is quicker to start."""

    def call(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["nexa", *map(str, arguments)])
        try:
            code: object = main()
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Two checkpoints of one run."""
    (tmp_path / "models").mkdir()
    publish_chain(open_store(str(tmp_path / "models")), tmp_path / "files", 1, 2)
    return tmp_path / "models"


def test_help_takes_well_under_200_ms_of_a_processor() -> None:
    # Where the tests' coverage is measured it would be measured here too, and take half of the time.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "nexa_train", "--help"], env=plain, capture_output=True, check=False
        )
        assert done.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.2


def test_help_loads_neither_torch_nor_pydantic_nor_rich() -> None:
    code = (
        "import sys\n"
        "from nexa_train.__main__ import main\n"
        "sys.argv = ['nexa', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    print(ended.code, *sorted({n.partition('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code_and_modules = done.stdout.splitlines()[-1].split()
    assert code_and_modules[0] == "0"
    assert not {"torch", "pydantic", "rich", "yaml", "obstore"} & set(code_and_modules)


def test_help_names_every_command_with_a_sentence(nexa: Nexa) -> None:
    text = nexa("--help").stdout
    found = {words[0]: words[1:] for line in text.splitlines() if (words := line.split()) and words[0] in COMMANDS}
    assert set(found) == set(COMMANDS)
    assert all(len(sentence) >= 3 for sentence in found.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(nexa: Nexa, command: str) -> None:
    done = nexa(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: nexa {command}")
    options = [line.split() for line in done.stdout.splitlines() if line.startswith("  -")]
    assert all(len(words) > 2 or words[0] == "--help" for words in options)


@pytest.mark.parametrize("arguments", [["trian"], ["validate", "--nodes", "2"]], ids=" ".join)
def test_no_mistake_at_the_keyboard_shows_a_traceback(arguments: list[str]) -> None:
    done = in_a_process(*arguments)
    assert done.returncode in (2, 3)
    assert done.stderr
    assert "Traceback" not in done.stderr


MISUSED = {
    "no command": ([], "Usage: nexa"),
    "an unknown command": (["trian"], "No such command 'trian'"),
    "an unknown option": (["validate", "--nodes", "2"], "No such option: --nodes"),
    "a missing argument": (["verify"], "Missing argument"),
    "an unknown format": (["version", "-o", "xml"], "'xml' is not one of 'text', 'json'"),
    "neither file nor recipe": (["plan"], "nexa: error: give either a job file or --config-mode RECIPE"),
    "no scheduler": (["submit", "--config-mode", "v3"], "nexa: error: submit: name a scheduler: --slurm"),
    "an unknown recipe": (["validate", "--config-mode", "v9"], "nexa: error: --config-mode v9: no such recipe"),
}


@pytest.mark.parametrize(("arguments", "expected"), MISUSED.values(), ids=MISUSED)
def test_wrong_usage_ends_with_2_and_a_message(nexa: Nexa, arguments: list[str], expected: str) -> None:
    done = nexa(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr + done.stdout


def test_validate_answers_in_json_with_the_run_id(nexa: Nexa, job: Path) -> None:
    answer = json.loads(nexa("validate", job, "-o", "json").stdout)
    assert answer == {"valid": True, "name": "demo", "run_id": load_job(job).run_id}


def test_validate_reads_the_data_too_where_asked(nexa: Nexa, job: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    done = nexa("validate", job, "--data", "--set", f"data.remote_uri={rows}", "--set", "model.name=tiny")
    assert done.stdout.splitlines()[1:] == ["train data: 1 rows, 1 sequences, 18 tokens, 27.8 % learnt"]
    rows.write_text('{"text": "Hi."}')
    done = nexa("validate", job, "--data", "--set", f"data.remote_uri={rows}", "--set", "model.name=tiny")
    assert (done.returncode, done.stdout) == (5, "")
    assert "rows.jsonl row 1: no column 'messages'" in done.stderr


def test_plan_answers_in_json_with_what_is_decided(nexa: Nexa, job: Path) -> None:
    answer = json.loads(nexa("plan", job, "-o", "json", "--set", "cluster.num_nodes=2").stdout)
    decided = {key: answer[key] for key in ("world_size", "global_batch", "microbatch", "accumulation", "total_steps")}
    assert decided == {"world_size": 2, "global_batch": 8, "microbatch": 4, "accumulation": 1, "total_steps": 4}
    assert answer["memory"]["weights"] > 0


def test_plan_tells_people_the_arithmetic_of_a_step(nexa: Nexa, job: Path) -> None:
    text = nexa("plan", job, "--set", "training.microbatch_size_per_gpu=2").stdout
    assert "8 sequences = 2 a microbatch x 4 accumulated x 1 ranks" in text
    assert "4 steps, a checkpoint every 100" in text


@pytest.mark.parametrize("backend", CONFIGS)
def test_plan_shows_exactly_what_the_backends_library_is_given(nexa: Nexa, job: Path, backend: str) -> None:
    sets = ("--set", f"backend={backend}", "--set", "optimizer.max_grad_norm=0.5")
    loaded = load_job(job, sets=sets[1::2])
    given = CONFIGS[backend](loaded.spec, plan_of(loaded))
    assert yaml.safe_load(nexa("plan", job, *sets, "--show-backend-config").stdout) == given
    assert json.loads(nexa("plan", job, *sets, "--show-backend-config", "-o", "json").stdout) == given
    assert 0.5 in given.values()


MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 4096,
}


@pytest.mark.parametrize("units", ["avx2", "avx512_bf16"], ids=["without bf16 units", "with bf16 units"])
@pytest.mark.parametrize("backend", ["hf", "deepspeed"])
def test_what_is_shown_is_what_a_run_on_this_machine_gives(
    nexa: Nexa, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, units: str
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"model name : Some CPU\nflags : {units}\n")
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    model = shutil.copytree(TINY_TOKENIZER, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(MODEL))
    (model / "model.safetensors").write_bytes(b"weights")
    said = {"backend": backend, "model.name": model, "training.precision": "bf16", "tuning": "{type: lora, rank: 4}"}
    said |= {"data.remote_uri": tmp_path / "train.jsonl", "artifacts.uri": tmp_path / "artifacts"}
    sets = [f"{key}={value}" for key, value in said.items()]
    shown = nexa("plan", job, *(part for one in sets for part in ("--set", one)), "--show-backend-config", "-o", "json")
    work = make_ready(load_job(job, sets=sets), Node())
    assert isinstance(work, RankWork)
    assert json.loads(shown.stdout) == backend_config(work.spec, work.plan)
    assert (work.plan.precision, work.plan.microbatch) == ("fp32" if units == "avx2" else "bf16", 8)
    assert ("fp32 instead of bf16" in shown.stderr) is (units == "avx2")


def test_a_plan_says_where_it_waits_for_the_models_sizes(nexa: Nexa, job: Path) -> None:
    sets = ("--set", "model.name=nobody/no-model")
    said = "auto is planned as 1 and may become more, for the sizes of nobody/no-model are not known before a run has"
    assert said in nexa("plan", job, *sets).stderr
    assert nexa("plan", job, *sets, "--set", "training.microbatch_size_per_gpu=2").stderr == ""


@pytest.mark.parametrize("command", [["validate"], ["plan"], ["submit", "--slurm"]], ids=lambda words: words[0])
def test_longer_sequences_than_a_known_model_takes_are_refused_without_it(
    nexa: Nexa, job: Path, command: list[str]
) -> None:
    done = nexa(*command, job, "--set", "model.name=falcon3-1b", "--set", "model.max_seq_len=8193")
    assert done.returncode == 2
    assert "model.max_seq_len: 8193 is more than the 8192 tokens falcon3-1b takes" in done.stderr


def test_the_native_backend_configures_no_library(nexa: Nexa, job: Path) -> None:
    assert nexa("plan", job, "--show-backend-config").stdout.startswith("# backend fsdp is Nexa's own loop")
    assert json.loads(nexa("plan", job, "--show-backend-config", "-o", "json").stdout) == {}


def test_version_answers_in_json(nexa: Nexa) -> None:
    assert json.loads(nexa("version", "-o", "json").stdout) == {"version": __version__}


def test_submit_without_sbatch_prints_the_script(
    nexa: Nexa, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = nexa("submit", job, "--slurm", "--run-name", "mine")
    assert done.returncode == 0
    assert "#SBATCH --job-name=mine\n" in done.stdout


def test_a_cache_that_cannot_be_used_is_named_in_json_too(
    nexa: Nexa, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "file"))
    done = nexa("run", job, "-o", "json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["exit_code"], said["cause"], said["retryable"]) == (2, 2, "ConfigError", False)
    assert said["message"].endswith("cannot be made: Not a directory; set NEXA_CACHE to a folder where you may write")
    assert done.stderr == f"nexa: error: {said['message']}\n"


def test_what_nobody_foresaw_is_in_the_json_and_its_place_in_the_trace(job: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho. " * 800}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    sets = [f"data.remote_uri={tmp_path}/train.jsonl", f"artifacts.uri={tmp_path}/artifacts", "model.max_seq_len=4096"]
    command = [sys.executable, "-m", "nexa_train", "run", str(job), "-o", "json", *(f"--set={one}" for one in sets)]
    done = subprocess.run(
        ["bash", "-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "-", *command],  # files of at most 1 KiB
        env={**os.environ, "NEXA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["exit_code"], said["cause"]) == (1, 1, "OSError")
    assert "in prepare" in done.stderr


def test_verify_counts_what_is_whole(nexa: Nexa, artifacts: Path) -> None:
    done = nexa("verify", artifacts, "-o", "json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], answer["problems"], answer["num_files"]) == (0, True, [], 4)
    assert [one["step"] for one in answer["manifests"]] == [1, 2]


def test_verify_ends_with_1_where_one_byte_differs_and_names_the_file(artifacts: Path) -> None:
    weights = next(artifacts.glob(f"checkpoints/{RUN}/step-00000002/data/*/model.safetensors"))
    weights.write_bytes(b"00000003")
    done = in_a_process("verify", artifacts)
    assert done.returncode == 1
    assert f"damaged: model.safetensors of checkpoints/{RUN}/step-00000002" in done.stdout
    assert "1 problems in: 2 manifests" in done.stdout


def test_verify_says_so_in_json_too(nexa: Nexa, artifacts: Path) -> None:
    next(artifacts.glob(f"checkpoints/{RUN}/step-00000001/data/*/model.safetensors")).unlink()
    done = nexa("verify", artifacts, "-o", "json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], len(answer["problems"])) == (1, False, 1)


def test_verify_ends_with_3_where_nothing_is(nexa: Nexa, tmp_path: Path) -> None:
    done = nexa("verify", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("nexa: error: no manifest.json at or below")


@pytest.mark.parametrize("command", [["validate"], ["plan", "--show-backend-config"], ["submit", "--slurm"]])
def test_what_a_backends_library_has_no_words_for_is_refused_before_anything_starts(
    nexa: Nexa, job: Path, command: list[str]
) -> None:
    sets = ("--set", "backend=axolotl", "--set", "tuning={type: lora, rank: 4, alpha: 2.5}")
    done = nexa(*command, job, *sets)
    assert done.returncode == 2
    assert "tuning.alpha: 2.5 is not available on backend axolotl, which takes whole numbers" in done.stderr


def test_a_job_is_not_submitted_from_an_environment_that_cannot_carry_its_backend(nexa: Nexa, job: Path) -> None:
    done = nexa("submit", job, "--slurm", "--set", "backend=axolotl")
    assert done.returncode == 2
    assert "backend: axolotl runs in an environment of its own, and this is not it" in done.stderr
