"""The name of a model -> a folder on this machine, or one clear line that says how to give one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nexa_train.config.spec import JobSpec, ModelSpec
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.errors import ConfigError, NotFoundError
from nexa_train.models.locate import CONVERSION, TINY_TOKENIZER, architecture, architecture_here, check_model, locate
from nexa_train.registry import MODELS, TINY_VOCAB_SIZE, Architecture, scratch


def model_folder(path: Path, *, without: str = "", weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    for name in {"config.json", "tokenizer.json", weights} - {without}:
        (path / name).write_bytes(b"{}")
    return path


def test_a_folder_with_config_tokenizer_and_weights_is_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    found = locate(ModelSpec(name=str(folder)))
    assert (found.folder, found.scratch, found.loadable) == (folder, None, str(folder))
    assert found.origin.startswith(f"folder {folder} sha256:")


def test_other_weights_in_the_same_folder_are_another_origin(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    before = locate(ModelSpec(name=str(folder))).origin
    (folder / "optimizer-00001-of-00002.safetensors").write_bytes(b"of a checkpoint")
    assert locate(ModelSpec(name=str(folder))).origin == before
    (folder / "model.safetensors").write_bytes(b"other")
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "lla', "is not valid JSON: Unterminated string"),
        ("[" * 100_000, "is not valid JSON: "),
        ("[]", "holds list, expected a JSON object"),
        ('{"num_attention_heads": 0}', "num_attention_heads is 0, expected a whole number of 1 or more"),
        ('{"hidden_size": "64"}', "hidden_size is '64', expected a whole number of 1 or more"),
    ],
    ids=["cut short", "without end", "a list", "no heads", "a word"],
)
def test_a_config_that_cannot_be_one_is_named(tmp_path: Path, text: str, said: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(text)
    model = ModelSpec(name=str(folder))
    spec = JobSpec.model_validate({"model": {"name": str(folder)}, "data": {"remote_uri": "x"}})
    for reads in (
        lambda: architecture_here(model),
        lambda: check_model(locate(model), spec, load_tokenizer(TINY_TOKENIZER)),
    ):
        with pytest.raises(ConfigError) as caught:
            reads()
        assert str(caught.value).startswith(f"model: {folder.resolve() / 'config.json'}")
        assert said in str(caught.value)


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


def adapter_folder(path: Path, config: str) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"")
    (path / "adapter_config.json").write_text(config)
    return path


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}', "meta-llama/Llama-3.2-1B"),
        ('{"base_model_name_or_path": null}', "a model that it does not name"),
        ("not JSON", "a model that it does not name"),
        ("[]", "a model that it does not name"),
    ],
    ids=["of a model", "of none", "damaged", "of another kind"],
)
@pytest.mark.parametrize("beside", [[], ["tokenizer.json"], ["config.json", "tokenizer.json"]], ids=len)
def test_an_adapter_is_refused_as_one_and_its_base_named(
    tmp_path: Path, config: str, base: str, beside: list[str]
) -> None:
    folder = adapter_folder(tmp_path / "adapter", config)
    for name in beside:
        (folder / name).write_text("{}")
    for look in (locate, architecture_here):
        with pytest.raises(ConfigError) as caught:
            look(ModelSpec(name=str(folder)))
        assert str(caught.value) == (
            f"model.name: {folder} is an adapter for {base}, not a whole model; give that model, or merge the adapter "
            "into it first (PEFT: merge_and_unload) and give the folder of the result"
        )


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert locate(ModelSpec(name=str(folder))).folder == folder


@pytest.mark.parametrize(
    ("name", "longest"), [("falcon3-1b", 8192), ("falcon3-1b-base", 4096), ("qwen2.5-7b-instruct", 32768)]
)
def test_longer_sequences_than_a_known_model_takes_are_refused_before_it_is_looked_for(name: str, longest: int) -> None:
    said = f"model.max_seq_len: {longest + 1} is more than the {longest} tokens {name} takes; set it to {longest} or"
    for look in (locate, architecture_here):
        with pytest.raises(ConfigError, match=said):
            look(ModelSpec(name=name, max_seq_len=longest + 1))
    assert architecture_here(ModelSpec(name=name, max_seq_len=longest)) == MODELS[name].architecture


def test_a_folder_of_a_known_models_name_takes_what_its_own_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(Path("falcon3-1b"))
    assert locate(ModelSpec(name="falcon3-1b", max_seq_len=10_000)).folder == tmp_path / "falcon3-1b"


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 4096,
}
SIZES = Architecture(64, 2, 4, 4, 16, 96, 4096, tied_head=True)


def test_sizes_here_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert architecture_here(ModelSpec(name=str(folder))) == SIZES


def test_sizes_here_are_those_of_a_gguf_file_that_was_converted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.gguf").write_bytes(b"weights")
    model = ModelSpec(name=str(tmp_path / "small.gguf"))
    assert architecture_here(model) is None
    digest = hashlib.sha256(b"weights").hexdigest()
    folder = model_folder(tmp_path / "cache/models" / f"small-{digest[:16]}-{CONVERSION}")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert architecture_here(model) == SIZES
    assert locate(model).loadable == str(folder)


# The hub's client reads its environment once, and knows nothing of a hub when told to stay offline.
FROM_THE_CACHE = """
from nexa_train.config.spec import ModelSpec
from nexa_train.models.locate import architecture_here, locate
model = ModelSpec(name="somebody/some-model")
found = locate(model)
print(architecture_here(model).d_model, found.loadable, found.revision, found.origin)
print(architecture_here(ModelSpec(name="somebody/another-model")), architecture_here(ModelSpec(name="no name/at all")))
"""


def test_a_model_in_the_hubs_cache_is_known_by_id_and_commit(tmp_path: Path) -> None:
    commit = "5" * 40
    cached = tmp_path / "hub/models--somebody--some-model"
    folder = model_folder(cached / "snapshots" / commit)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", FROM_THE_CACHE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        f"64 somebody/some-model {commit} hub somebody/some-model@{commit}",
        "None None",
    ], done.stderr


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_never_loaded(tmp_path: Path, weights: str) -> None:
    folder = model_folder(tmp_path / "model", weights=weights)
    with pytest.raises(ConfigError, match=r"has no \*.safetensors; pickled weights are not loaded, convert them first"):
        locate(ModelSpec(name=str(folder)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    for look in (locate, architecture_here):
        with pytest.raises(ConfigError, match=r"model.bin is a file, but not a .gguf; give a folder or a GGUF file"):
            look(ModelSpec(name=str(tmp_path / "model.bin")))


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


OLD, NEW = "1" * 40, "2" * 40
CONTENT = b"{}"


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of it, for models of two commits whose files are all the same.

    The first part of a model's id says how it answers.
    """

    def do_GET(self) -> None:
        owner, _, rest = self.path.removeprefix("/api/models").lstrip("/").partition("/")
        if owner == "down":
            self._answer(503, b"")
        elif owner == "gated":
            self._answer(403, b"", **{"X-Error-Code": "GatedRepo"})
        elif owner == "nobody":
            self._answer(401, b"", **{"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in rest and not rest.endswith("/main"):
            self._answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in rest:
            files = [{"type": "file", "path": name, "size": len(CONTENT), "oid": name} for name in FILES]
            self._answer(200, json.dumps(files).encode())
        elif "/resolve/" in rest:
            commit = rest.split("/")[2]
            self._answer(200, CONTENT, **{"ETag": f'"{rest[-9:]}"', "X-Repo-Commit": commit})
        else:
            self._answer(200, json.dumps({"id": "somebody/some-model", "sha": NEW, "siblings": []}).encode())

    do_HEAD = do_GET

    def _answer(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Its requests are nobody's output."""


FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


FROM_A_HUB = """
import sys
from nexa_train.config.spec import ModelSpec
from nexa_train.errors import NexaError
from nexa_train.models.locate import locate
name, revision, begun_with = sys.argv[1:]
try:
    print(locate(ModelSpec(name=name, revision=revision or None), begun_with=lambda: begun_with).origin)
except NexaError as exc:
    print(exc.exit_code, exc.retryable, exc)
"""


def said_of(endpoint: str, home: Path, name: str, *, revision: str = "", begun_with: str = "") -> str:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", FROM_A_HUB, name, revision, begun_with]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("nobody/some-model", "", "3 False .*RepositoryNotFound.*; set HF_TOKEN, or give a local folder"),
        ("gated/some-model", "", "3 False .*does not give them to us .*GatedRepoError.*; set HF_TOKEN, or"),
        ("somebody/some-model", "v1", "3 False .*the hub gave none .*RevisionNotFound.*; give a local folder"),
        ("down/some-model", "", "1 True .*cannot give them now .*503.*; run again later, or give a local folder"),
    ],
)
def test_a_hub_that_fails_is_told_from_one_that_will_not_give_a_model(
    hub: str, tmp_path: Path, name: str, revision: str, said: str
) -> None:
    assert re.match(said, said_of(hub, tmp_path, name, revision=revision))


def test_a_hub_that_cannot_be_reached_may_be_there_again_later(tmp_path: Path) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        said = said_of(endpoint, tmp_path, "somebody/some-model")
    assert re.match("1 True .*cannot give them now .*; run again later", said)


def test_a_run_goes_on_with_the_commit_it_began_with(hub: str, tmp_path: Path) -> None:
    def origin(begun_with: str, revision: str = "") -> str:
        return said_of(hub, tmp_path, "somebody/some-model", revision=revision, begun_with=begun_with)

    begun = f"hub somebody/some-model@{OLD}"
    assert origin("") == origin("hub another/model@" + OLD) == origin("scratch") == f"hub somebody/some-model@{NEW}"
    assert origin(begun) == origin(begun, revision="v1") == begun


def test_tiny_needs_nothing_but_what_is_shipped() -> None:
    found = locate(ModelSpec(name="tiny"))
    assert (found.folder, found.scratch, found.origin) == (TINY_TOKENIZER, MODELS["tiny"].architecture, "scratch")
    assert found.loadable is None, "its weights are in no file"


def test_sizes_build_that_architecture_with_the_shipped_tokenizer() -> None:
    found = locate(ModelSpec(name="whatever", d_model=64, n_layers=2, n_heads=4))
    assert (found.folder, found.scratch) == (TINY_TOKENIZER, scratch(64, 2, 4, TINY_VOCAB_SIZE))


@pytest.mark.parametrize(
    ("name", "known"), [("tiny", True), ("falcon3-10b", True), ("somebody/some-model", False), ("/models/a", False)]
)
def test_sizes_are_known_for_models_of_the_registry_only(name: str, known: bool) -> None:
    assert (architecture(ModelSpec(name=name)) is not None) is known


def test_a_model_in_nobodys_home_is_a_wrong_name() -> None:
    for look in (locate, architecture_here):
        with pytest.raises(ConfigError, match="~nobody-of-this-name has no home here"):
            look(ModelSpec(name="~nobody-of-this-name/model"))
