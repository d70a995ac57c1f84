"""Files, recipes and overrides -> one validated `Job`. Comes after `source.py`, before planning.

Precedence, weakest first: the schema's defaults, the recipe (`--config-mode`), the job file, the command
line's own flags, `--set key=value` in the order given. Every error names file, line, key, value, and what
is allowed.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel, to_snake
from pydantic_core import ErrorDetails

from nexa_train.config.job import API_VERSION, KIND, Job
from nexa_train.config.source import Path_, Source, read_source
from nexa_train.errors import ConfigError

RECIPES = Path(__file__).parent.parent / "configs"


def recipe_names() -> list[str]:
    """The recipes that are shipped, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_job(
    path: Path | None = None,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    name: str | None = None,
) -> Job:
    """Load a job from a file or a shipped recipe and apply overrides.

    Args:
        path: a manifest (apiVersion, kind, metadata, spec) or a bare spec in either spelling.
        recipe: name of a shipped recipe.
        overrides: dotted key of the spec -> value, from the command line's flags.
        sets: `key=value` texts, values in YAML; win over `overrides`.
        name: metadata.name, wins over the file's.

    Raises:
        ConfigError, NotFoundError: see the module.
    """
    source = _open(path, recipe)
    document = _as_manifest(source)
    prefix: Path_ = ("spec",) if "spec" in source.values else ()
    changes = [(key, value, "command line") for key, value in (overrides or {}).items()]
    changes += [(*_split_set(text), f"--set {text}") for text in sets]
    given: dict[Path_, str] = {}
    for key, value, origin in changes:
        given[_apply(document["spec"], key, value, origin)] = origin
    if name is not None:
        document["metadata"] = {**(document.get("metadata") or {}), "name": name}
    try:
        return Job.model_validate(document)
    except ValidationError as exc:
        raise ConfigError("\n".join(_explain(error, source, prefix, given) for error in exc.errors())) from exc


def job_from_object(body: Mapping[str, Any]) -> Job:
    """Validate a NexaTrainingJob as the API server hands it out.

    Raises:
        ConfigError: the object does not fit the schema.
    """
    metadata = body.get("metadata") or {}
    kept = {key: metadata[key] for key in ("name", "namespace", "labels", "annotations") if metadata.get(key)}
    source = Source(f"{KIND}/{metadata.get('name', '?')}", dict(body))
    try:
        return Job.model_validate({"metadata": kept, "spec": body.get("spec") or {}})
    except ValidationError as exc:
        raise ConfigError("; ".join(_explain(error, source, ("spec",), {}) for error in exc.errors())) from exc


def _open(path: Path | None, recipe: str | None) -> Source:
    if (path is None) == (recipe is None):
        raise ConfigError("give either a job file or --config-mode RECIPE, exactly one of them")
    if path is not None:
        return read_source(path)
    if recipe not in recipe_names():
        raise ConfigError(f"--config-mode {recipe}: no such recipe; shipped are {', '.join(recipe_names())}")
    return read_source(RECIPES / f"{recipe}.yaml")


def _as_manifest(source: Source) -> dict[str, Any]:
    """Both shapes of a file -> {metadata, spec}; a bare spec is named after its file."""
    values = source.values
    if "apiVersion" not in values and "kind" not in values and "spec" not in values:
        spec = {key: value for key, value in values.items() if key != "name"}
        return {"metadata": {"name": values.get("name") or _label(Path(source.name).stem)}, "spec": spec}
    for key, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if values.get(key) != expected:
            raise ConfigError(f"{source.where((key,))}: {key}: got {values.get(key)!r}, expected {expected!r}")
    if unknown := sorted(set(values) - {"apiVersion", "kind", "metadata", "spec", "status"}):
        raise ConfigError(f"{source.where((unknown[0],))}: {unknown[0]}: unknown key beside metadata and spec")
    if not isinstance(values.get("spec"), dict):
        raise ConfigError(f"{source.where(('spec',))}: spec: expected a mapping, found {values.get('spec')!r}")
    return {"metadata": values.get("metadata") or {}, "spec": dict(values["spec"])}


def _label(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:45].strip("-") or "job"


def _split_set(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, such as --set training.max_steps=20")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from exc


def _apply(spec: dict[str, Any], dotted: str, value: Any, origin: str) -> Path_:
    """Set one key in place, whichever spelling the file used; returns the path as written."""
    *parents, last = dotted.split(".")
    written: list[str | int] = []
    here: dict[str, Any] = spec
    for parent in parents:
        key = _spelled(here, parent)
        child = here.get(key)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{origin}: {dotted}: {parent} is {child!r}, not a group of keys")
        # Copied on the way down: the values read from the file stay as they were read.
        here[key] = dict(child or {})
        here = here[key]
        written.append(key)
    key = _spelled(here, last)
    here[key] = value
    return (*written, key)


def _spelled(mapping: Mapping[str, Any], key: str) -> str:
    return next((known for known in mapping if to_snake(str(known)) == to_snake(key)), key)


def _explain(error: ErrorDetails, source: Source, prefix: Path_, given: Mapping[Path_, str]) -> str:
    """One pydantic error -> `file:line: key: what was seen; what is allowed`."""
    location = error["loc"][1:] if error["loc"][:1] == ("spec",) else error["loc"]
    in_spec = error["loc"][:1] == ("spec",)
    path, model = _written(location if in_spec else error["loc"], source, prefix if in_spec else ())
    shown = ".".join(map(str, path)) or "spec"
    origin = next((text for key, text in given.items() if path[: len(key)] == key), None)
    where = origin or source.where((*prefix, *path) if in_spec else path)
    return f"{where}: {shown}: {_reason(error, model)}"


def _written(location: Path_, source: Source, prefix: Path_) -> tuple[Path_, type[BaseModel] | None]:
    """Drop the tags of unions from a pydantic location, find the spelling used and the model it is in."""
    from_spec = prefix == ("spec",) or "spec" not in source.values
    model: Any = Job.model_fields["spec"].annotation if from_spec else Job
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    for step in location:
        owner = model if isinstance(model, type) and issubclass(model, BaseModel) else owner
        branches = _branches(model)
        if step in branches:
            model = owner = branches[step]
            continue
        if isinstance(model, type) and issubclass(model, BaseModel):
            name = to_snake(str(step))
            field = model.model_fields.get(name)
            path.append(step)
            model = field.annotation if field else None
        elif isinstance(step, int):
            path.append(step)
            arguments = typing.get_args(model)
            model = arguments[0] if arguments else None
        elif model is not None and typing.get_origin(model) is dict:
            path.append(step)
        # Anything else is a name pydantic gives to a branch such as `int` or `literal['auto']`.
    return tuple(path), owner


def _branches(model: Any) -> dict[str | int, type[BaseModel]]:
    """The members of a tagged union by their tag; empty for anything else."""
    if typing.get_origin(model) not in (typing.Union, types.UnionType):
        return {}
    members = [member for member in typing.get_args(model) if "type" in getattr(member, "model_fields", {})]
    return {member.model_fields["type"].default: member for member in members}


def _reason(error: ErrorDetails, model: type[BaseModel] | None) -> str:
    kind, seen = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(str(error["loc"][-1]), model)
    if kind == "missing":
        return "required, and not given"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    if kind == "union_tag_invalid":
        return f"got {error['ctx']['tag']!r} as type; expected one of {error['ctx']['expected_tags']}"
    return f"got {seen!r}; expected {re.sub(r'^Input should be |^String should ', '', message)}"


def _unknown_key(key: str, model: type[BaseModel] | None) -> str:
    names = list(model.model_fields) if model else []
    camel = "_" not in key and key != key.lower()
    shown = [to_camel(name) if camel else name for name in names]
    close = difflib.get_close_matches(to_snake(key), names, n=1, cutoff=0.6)
    if close:
        meant = to_camel(close[0]) if camel else close[0]
        return f"unknown key; did you mean {meant}?"
    return f"unknown key; allowed here: {', '.join(sorted(shown))}"
