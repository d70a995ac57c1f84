"""The name of a model -> a local folder with config, tokenizer and weights. No torch in this process.

Comes after planning and before data preparation, which needs the tokenizer. Looks, in this order, at: a
folder or GGUF file of that path, the shipped tokenizer (models built from scratch), a Python package that
carries the weights, the hub's local cache, the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexa_train.cache import cache_folder, made_whole
from nexa_train.config.spec import JobSpec, ModelSpec
from nexa_train.data.tokenizer import ChatTokenizer, read_object
from nexa_train.errors import ConfigError, NexaError, NotFoundError
from nexa_train.registry import MODELS, TINY_VOCAB_SIZE, Architecture, scratch
from nexa_train.store.address import local_path

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Decoders whose logits are the head's product, perhaps with a soft cap, so that the loss may apply the head itself."""

CONVERSION = 2
"""Of GGUF files: what was converted otherwise is not taken."""
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")

TINY_TOKENIZER = Path(__file__).parent.parent / "assets" / "tiny_tokenizer"


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        folder: holds tokenizer.json, and config.json with weights unless built from scratch.
        scratch: the architecture to build with fresh weights; None: weights are in `folder`.
        origin: where it came from, for the manifest.
        hub_id, revision: of a model of the hub, the revision as a commit.
    """

    folder: Path
    scratch: Architecture | None
    origin: str
    hub_id: str | None = None
    revision: str | None = None

    @property
    def loadable(self) -> str | None:
        """What other libraries load these weights by, with `revision`: a hub id or a folder; None: they are fresh."""
        return None if self.scratch else self.hub_id or str(self.folder)


def locate(model: ModelSpec, *, begun_with: Callable[[], str] = str) -> Located:
    """Find or fetch a model.

    Args:
        begun_with: says the origin with which the run began, for its later attempts: a branch or tag of the hub may
            stand for another commit by now. Only asked of a model of the hub.

    Raises:
        ConfigError: the path is there, but is not a model; or the model is known to take shorter sequences.
        NotFoundError: nowhere to be had; says where it was looked for and how to give a folder.
        NexaError: the hub cannot be reached, or failed; it may give the model to another attempt.
    """
    check_length(model)
    if model.revision and ("/" not in model.name or local_path(model.name).exists()):
        raise ConfigError(
            f"model.revision: {model.revision} is given, but only a hub id has revisions, not {model.name}"
        )
    if model.from_scratch or model.name == "tiny":
        return Located(TINY_TOKENIZER, architecture(model), "scratch")
    path = local_path(model.name)
    if path.is_dir():
        return _checked_folder(path, origin=f"folder {model.name} sha256:{_folder_digest(path)[:16]}")
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, origin=f"gguf {path.name}")
    if path.exists():
        raise _another_file(model)
    if (entry := MODELS.get(model.name)) and entry.package and (gguf := _packaged_gguf(entry.package)):
        return _from_gguf(gguf, origin=f"package {entry.package}")
    hub_id = entry.hub_id if entry else model.name
    if hub_id is None or not _is_hub_id(hub_id):
        close = difflib.get_close_matches(model.name.lower(), MODELS, n=3) or ["tiny", "llama-3.2-1b", "qwen3-4b"]
        raise NotFoundError(
            f"model.name: {model.name} is neither a folder on this machine nor a known model "
            f"(such as {', '.join(close)}) nor a hub id"
        )
    return _from_hub(hub_id, _commit_of(hub_id, begun_with()) or model.revision)


def architecture(model: ModelSpec, located: Located | None = None) -> Architecture | None:
    """Sizes of a model: from its folder where there is one, else as the registry knows them; None: unknown."""
    if located is not None and located.scratch is None:
        return sizes_of(read_model_config(located.folder / "config.json"))
    if model.d_model and model.n_layers and model.n_heads:
        return scratch(model.d_model, model.n_layers, model.n_heads, TINY_VOCAB_SIZE)
    entry = MODELS.get(model.name)
    return entry.architecture if entry else None


def architecture_here(model: ModelSpec) -> Architecture | None:
    """Sizes as a run on this machine finds them; None: it has to fetch or to convert the model first.

    Raises:
        ConfigError: as `locate`.
    """
    check_length(model)
    path = local_path(model.name)
    if model.from_scratch or not path.exists():
        return architecture(model) or _cached_sizes(model)
    if path.is_dir():
        return architecture(model, _checked_folder(path, origin=""))
    if path.suffix != ".gguf":
        raise _another_file(model)
    converted = _converted(path, _digest(path))
    return architecture(model, _checked_folder(converted, origin="")) if converted.is_dir() else None


def check_length(model: ModelSpec) -> None:
    """Refuse sequences longer than a known model takes, before it is fetched; `check_model` knows of any model.

    Raises:
        ConfigError: names both lengths.
    """
    entry = MODELS.get(model.name)
    if entry is None or model.from_scratch or Path(model.name).exists():
        return
    if entry.max_seq_len is not None and model.max_seq_len > entry.max_seq_len:
        raise _too_long(model, entry.max_seq_len)


def check_model(located: Located, spec: JobSpec, tokenizer: ChatTokenizer) -> None:
    """Refuse a model that cannot be trained as the job says; reads its config.json only.

    Raises:
        ConfigError: of an untested kind, of shorter sequences, or with fewer ids than its tokenizer makes.
    """
    if located.scratch is not None:
        return
    config = read_model_config(located.folder / "config.json")
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise ConfigError(
            f"model.name: {spec.model.name} is of type {kind}; this version trains {', '.join(MODEL_TYPES)}"
        )
    longest = config.get("max_position_embeddings")
    if longest is not None and spec.model.max_seq_len > longest:
        raise _too_long(spec.model, longest)
    known, needed = config.get("vocab_size"), max(tokenizer.fast.get_vocab().values()) + 1
    if known is not None and needed > known:
        raise ConfigError(f"model.name: {spec.model.name} embeds {known} ids, but its tokenizer makes {needed}")


def read_model_config(path: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ConfigError: it is not JSON, or a size in it is not one.
    """
    config = read_object(path)
    for key in _SIZES:
        if key in config and not (type(config[key]) is int and config[key] > 0):
            raise ConfigError(f"model: {path}: {key} is {config[key]!r}, expected a whole number of 1 or more")
    return config


def sizes_of(config: dict[str, Any]) -> Architecture | None:
    """A llama-like config.json as an architecture; None where it names its sizes otherwise."""
    try:
        d_model, heads, kind = config["hidden_size"], config["num_attention_heads"], config.get("model_type")
        return Architecture(
            d_model=d_model,
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or d_model // heads,
            d_ff=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_head=bool(config.get("tie_word_embeddings", True)),
            qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            norms=4 if kind in ("gemma2", "gemma3_text") else 2,
        )
    except KeyError:
        return None


def _too_long(model: ModelSpec, longest: int) -> ConfigError:
    return ConfigError(
        f"model.max_seq_len: {model.max_seq_len} is more than the {longest} tokens {model.name} takes; "
        f"set it to {longest} or less"
    )


def _another_file(model: ModelSpec) -> ConfigError:
    return ConfigError(f"model.name: {model.name} is a file, but not a .gguf; give a folder or a GGUF file")


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _cached_sizes(model: ModelSpec) -> Architecture | None:
    """Of a model of the hub whose config.json was fetched before."""
    if not _is_hub_id(model.name):
        return None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - costly to import, and rarely needed

    with suppress(ValueError):  # no name that the hub would have
        found = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
        return sizes_of(read_model_config(Path(found))) if isinstance(found, str) else None
    return None


def _checked_folder(folder: Path, *, origin: str) -> Located:
    if _is_adapter(folder):
        raise ConfigError(
            f"model.name: {folder} is an adapter for {_base_of(folder)}, not a whole model; give that model, "
            "or merge the adapter into it first (PEFT: merge_and_unload) and give the folder of the result"
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"model.name: {folder} is not a model folder: it lacks {' and '.join(missing)}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.name: {folder} has no *.safetensors; pickled weights are not loaded, convert them first"
        )
    return Located(folder.resolve(), None, origin)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT saves it, and no model beside it."""
    weights = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model")]
    return (folder / "adapter_config.json").is_file() and not ((folder / "config.json").is_file() and weights)


def _base_of(folder: Path) -> str:
    """The model that an adapter says it is for."""
    with suppress(ValueError, AttributeError):  # not JSON, or not an object
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config.get("base_model_name_or_path") or "a model that it does not name")
    return "a model that it does not name"


def _folder_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of configuration and weights: what a run was trained from.

    A checkpoint's folder holds its optimiser, too, of which a run that begins with the weights knows nothing.
    """
    sha = hashlib.sha256()
    weights = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("optimizer")]
    for path in [folder / "config.json", *weights]:
        if path.is_file():
            with path.open("rb") as file:
                sha.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _from_gguf(path: Path, *, origin: str) -> Located:
    """De-quantise once into the cache, in a process of its own so that this one stays without torch."""
    digest = _digest(path)
    folder = _converted(path, digest)
    if not folder.is_dir():
        with made_whole(folder) as draft:
            command = [sys.executable, "-m", "nexa_train.models.gguf", str(path), str(draft)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == ConfigError.exit_code:
                raise ConfigError(f"model.name: {path}: {done.stderr.strip().splitlines()[-1]}")
            if done.returncode:
                raise NexaError(f"{path}: cannot be converted from GGUF: {done.stderr.strip()[-800:]}")
    return _checked_folder(folder, origin=f"{origin} sha256:{digest[:16]}")


def _converted(path: Path, digest: str) -> Path:
    """Where a GGUF file of that digest is, or will be, converted to."""
    return cache_folder("models") / f"{path.stem}-{digest[:16]}-{CONVERSION}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _origin_on_hub(hub_id: str, commit: str) -> str:
    return f"hub {hub_id}@{commit}"


def _commit_of(hub_id: str, origin: str) -> str | None:
    prefix = _origin_on_hub(hub_id, "")
    return origin.removeprefix(prefix) if origin.startswith(prefix) else None


def _from_hub(hub_id: str, revision: str | None) -> Located:
    # The hub's client reads these when it is first imported, and its progress bars would garble ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - costly to import, and rarely needed

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=patterns, etag_timeout=5)
    except Exception as exc:  # the client raises a dozen unrelated types
        raise _without_hub(hub_id, exc) from exc
    commit = Path(folder).name
    found = _checked_folder(Path(folder), origin=_origin_on_hub(hub_id, commit))
    return replace(found, hub_id=hub_id, revision=commit)


def _without_hub(hub_id: str, exc: Exception) -> NexaError:
    """What it means that the hub gave no model: it never will, or not now."""
    from huggingface_hub import constants, errors  # noqa: PLC0415 - imported by now

    not_there = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    missing = f"model.name: weights of {hub_id} are not on this machine"
    reason, advice = (
        f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}",
        "give a local folder with --set model.name=FOLDER",
    )
    status = exc.response.status_code if isinstance(exc, errors.HfHubHTTPError) else None
    if isinstance(exc, errors.GatedRepoError) or status in (401, 403):
        return NotFoundError(f"{missing} and the hub does not give them to us ({reason}); set HF_TOKEN, or {advice}")
    if isinstance(exc, not_there) or constants.HF_HUB_OFFLINE:
        return NotFoundError(f"{missing} and the hub gave none ({reason}); {advice}")
    return NexaError(f"{missing} and the hub cannot give them now ({reason}); run again later, or {advice}")
