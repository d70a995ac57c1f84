"""The name of a model -> a folder on this machine, or one clear line that says how to give one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexa_train.config.spec import JobSpec, ModelSpec
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.errors import ConfigError, NotFoundError
from nexa_train.models.locate import TINY_TOKENIZER, architecture, check_model, locate
from nexa_train.registry import MODELS, TINY_VOCAB_SIZE, scratch


def model_folder(path: Path, *, without: str = "", weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    for name in {"config.json", "tokenizer.json", weights} - {without}:
        (path / name).write_bytes(b"{}")
    return path


def test_a_folder_with_config_tokenizer_and_weights_is_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    found = locate(ModelSpec(name=str(folder)))
    assert (found.folder, found.scratch) == (folder, None)
    assert found.origin.startswith(f"folder {folder} sha256:")


def test_other_weights_in_the_same_folder_are_another_origin(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    before = locate(ModelSpec(name=str(folder))).origin
    next(folder.glob("*.safetensors")).write_bytes(b"other")
    assert locate(ModelSpec(name=str(folder))).origin != before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "is of type gpt2; this version trains gemma, gemma2, "),
        ({"model_type": "llama", "max_position_embeddings": 64}, "model.max_seq_len: 512 is more than the 64 tokens"),
        ({"model_type": "llama", "vocab_size": 10}, "embeds 10 ids, but its tokenizer makes 4096"),
    ],
    ids=["another kind", "too short", "too few ids"],
)
def test_a_model_that_does_not_fit_the_job_is_refused_by_its_config(
    tmp_path: Path, config: dict[str, object], said: str
) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    spec = JobSpec.model_validate({"model": {"name": str(folder)}, "data": {"remote_uri": "x"}})
    with pytest.raises(ConfigError, match=said):
        check_model(locate(spec.model), spec, load_tokenizer(TINY_TOKENIZER))


def test_a_revision_of_something_without_revisions_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="only a hub id has revisions"):
        locate(ModelSpec(name=str(folder), revision="main"))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_named_with_the_file(tmp_path: Path, missing: str) -> None:
    folder = model_folder(tmp_path / "model", without=missing)
    with pytest.raises(ConfigError, match=rf"model.name: {folder} is not a model folder: it lacks {missing}$"):
        locate(ModelSpec(name=str(folder)))


def test_an_empty_folder_lacks_everything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it lacks config.json and tokenizer.json"):
        locate(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_never_loaded(tmp_path: Path, weights: str) -> None:
    folder = model_folder(tmp_path / "model", weights=weights)
    with pytest.raises(ConfigError, match=r"has no \*.safetensors; pickled weights are not loaded, convert them first"):
        locate(ModelSpec(name=str(folder)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model.bin is a file, but not a .gguf; give a folder or a GGUF file"):
        locate(ModelSpec(name=str(tmp_path / "model.bin")))


@pytest.mark.parametrize("name", ["smollm", "a/b/c", "./a", "/nowhere/model", "~/nowhere"])
def test_an_unknown_name_lists_those_that_are_known(name: str) -> None:
    with pytest.raises(NotFoundError, match=r"is neither a folder .* nor a known model \(such as .*\) nor a hub id"):
        locate(ModelSpec(name=name))


def test_weights_that_only_the_hub_has_are_asked_for_as_a_folder_when_offline(tmp_path: Path) -> None:
    # In a process of its own: the hub's client reads its environment once.
    lines = [
        "from nexa_train.__main__ import guarded",
        "from nexa_train.config.spec import ModelSpec",
        "from nexa_train.models.locate import locate",
        "raise SystemExit(guarded(lambda: locate(ModelSpec(name='falcon3-1b'))))",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    [line] = done.stderr.splitlines()
    assert done.returncode == 3
    assert "weights of tiiuae/Falcon3-1B-Instruct are not on this machine" in line
    assert line.endswith("give a local folder with --set model.name=FOLDER")


def test_tiny_needs_nothing_but_what_is_shipped() -> None:
    found = locate(ModelSpec(name="tiny"))
    assert (found.folder, found.scratch, found.origin) == (TINY_TOKENIZER, MODELS["tiny"].architecture, "scratch")


def test_sizes_build_that_architecture_with_the_shipped_tokenizer() -> None:
    found = locate(ModelSpec(name="whatever", d_model=64, n_layers=2, n_heads=4))
    assert (found.folder, found.scratch) == (TINY_TOKENIZER, scratch(64, 2, 4, TINY_VOCAB_SIZE))


@pytest.mark.parametrize(
    ("name", "known"), [("tiny", True), ("falcon3-10b", True), ("somebody/some-model", False), ("/models/a", False)]
)
def test_sizes_are_known_for_models_of_the_registry_only(name: str, known: bool) -> None:
    assert (architecture(ModelSpec(name=name)) is not None) is known
