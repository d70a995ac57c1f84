"""Files, recipes and overrides -> one validated `Job`. Comes after `source.py`, before planning.

Precedence, weakest first: the schema's defaults, the job file or in its place a recipe (`--config-mode`), the flags of
`train.py`, `--set key=value` in the order given. Every error names file, line, key, value, and what is allowed.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel, to_snake
from pydantic_core import ErrorDetails

from nexa_train.config.base import Strict
from nexa_train.config.job import API_VERSION, KIND, Job
from nexa_train.config.source import Path_, Source, read_source
from nexa_train.config.spec import JobSpec
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
    changes = [(key, value, "command line") for key, value in (overrides or {}).items()]
    changes += [(*_split_set(text), f"--set {text}") for text in sets]
    given: dict[Path_, str] = {}
    for key, value, origin in changes:
        given["spec", *_apply(document["spec"], key, value, origin)] = origin
    if name is not None and isinstance(document["metadata"], dict):
        document["metadata"] = {**document["metadata"], "name": name}
        given["metadata", "name"] = f"--run-name {name}"
    try:
        return Job.model_validate(document)
    except ValidationError as exc:
        raise ConfigError("\n".join(dict.fromkeys(_explain(each, source, given) for each in exc.errors()))) from exc


def job_from_object(body: Mapping[str, Any]) -> Job:
    """Validate a NexaTrainingJob as the API server hands it out.

    Raises:
        ConfigError: the object does not fit the schema.
    """
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"{KIND}: metadata: got {metadata!r}; expected a group of keys")
    # Labels and annotations of a live object are not the job's: tools write what they like there.
    kept = {key: metadata[key] for key in ("name", "namespace") if metadata.get(key)}
    source = Source(f"{KIND}/{metadata.get('name', '?')}", dict(body))
    try:
        return Job.model_validate({"metadata": kept, "spec": body.get("spec") or {}})
    except ValidationError as exc:
        raise ConfigError("; ".join(dict.fromkeys(_explain(each, source, {}) for each in exc.errors()))) from exc


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
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    name = name if name[:1].isalpha() else f"job-{name}"
    return name[:45].strip("-")


def _split_set(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text}: expected key=value, such as --set training.max_steps=20")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as exc:  # ValueError: of what looks like a date and is none, 2024-02-30
        raise ConfigError(f"--set {text}: the value is not valid YAML; put text in quotes") from exc
    except RecursionError:
        raise ConfigError(f"--set {key.strip()}: nested too deep to be read") from None


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


def _explain(error: ErrorDetails, source: Source, given: Mapping[Path_, str]) -> str:
    """One pydantic error -> `file:line: key: what was seen; what is allowed`, keys spelled as the file spells them."""
    camel = _speaks_camel(source)
    in_spec = error["loc"][:1] == ("spec",)
    path, model = _written(error["loc"][1:], JobSpec) if in_spec else _written(error["loc"], Job)
    if error["type"] == "missing":
        path = (*path[:-1], _spell(str(path[-1]), camel))
    at: Path_ = ("spec", *path) if in_spec else path
    shown = ".".join(map(str, path)) or "spec"
    if at == ("metadata", "name") and "spec" not in source.values:
        at, shown = (("name",), "name") if at not in given else (at, shown)
    reason = _reason(error, model, camel)
    return f"{_where(at, reason, source, given)}: {shown}: {reason}"


def _where(at: Path_, reason: str, source: Source, given: Mapping[Path_, str]) -> str:
    """The override that gave the wrong value, or the line of the file; both for a check over several keys."""
    if origin := next((text for key, text in given.items() if at[: len(key)] == key), None):
        return origin
    overridden = dict.fromkeys(text for key, text in given.items() if key[: len(at)] == at)
    # A check across groups names its keys: the first that is written down has the line.
    named = [tuple(dotted.split(".")) for dotted in re.findall(r"[A-Za-z_]+(?:\.[A-Za-z_]+)+", reason)]
    places: dict[Path_, Path_] = (
        {tuple(to_snake(str(step)) for step in path): path for path in source.lines} if at == ("spec",) else {}
    )
    found = (places.get(_in_file(("spec", *map(to_snake, path)), source)) for path in named)
    line = source.where(next(filter(None, found), _in_file(at, source)))
    return f"{line} with {' and '.join(overridden)}" if overridden else line


def _in_file(at: Path_, source: Source) -> Path_:
    """A path of the whole object -> the path in this file, which may be a bare spec."""
    return at[1:] if at[:1] == ("spec",) and "spec" not in source.values else at


def _written(location: Path_, model: Any) -> tuple[Path_, type[BaseModel] | None]:
    """Drop the tags of unions from a pydantic location; returns the keys and the model the last one is in."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    for step in location:
        owner = model if _is_model(model) else owner
        branches = _branches(model)
        if step in branches:
            model = owner = branches[step]
            continue
        if _is_model(model):
            field = model.model_fields.get(to_snake(str(step)))
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


def _is_model(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)


def _branches(model: Any) -> dict[str | int, type[BaseModel]]:
    """The members of a tagged union by their tag; empty for anything else."""
    if typing.get_origin(model) not in (typing.Union, types.UnionType):
        return {}
    members = [member for member in typing.get_args(model) if "type" in getattr(member, "model_fields", {})]
    return {member.model_fields["type"].default: member for member in members}


def _reason(error: ErrorDetails, model: type[BaseModel] | None, camel: bool) -> str:
    kind, seen = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(str(error["loc"][-1]), model, camel)
    if kind == "missing":
        return "required, and not given"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return re.sub(r"[a-z]+(?:_[a-z]+)+", lambda word: _spell(word[0], camel), message)
    if kind == "union_tag_invalid":
        return f"got {error['ctx']['tag']!r} as type; expected one of {error['ctx']['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"got {seen!r}; its type is required, and not given"
    expected = error["msg"]
    for pattern, plain in _PLAINER:
        expected = re.sub(pattern, plain, expected)
    return f"got {seen!r}; expected {expected}"


_PLAINER = (
    (r"^Input should be ", ""),
    (r"^String should match pattern ", "a match of "),
    (r"^(String|List|Dictionary) should have ", ""),
    (r" after validation, not \d+$", ""),
    (r"^a valid dictionary.*", "a group of keys"),
)


def _unknown_key(key: str, model: type[BaseModel] | None, camel: bool) -> str:
    names = list(model.model_fields) if model else []
    if to_snake(key) in names and key in (to_snake(key), to_camel(to_snake(key))):
        return "given in both spellings; keep one"
    if "_" in key or key != key.lower():  # This key's own spelling says more than the rest of the file.
        camel = "_" not in key
    close = difflib.get_close_matches(to_snake(key), names, n=1, cutoff=0.6)
    if close:
        return f"unknown key; did you mean {_spell(close[0], camel)}?"
    return f"unknown key; allowed here: {', '.join(sorted(_spell(name, camel) for name in names))}"


def _spell(key: str, camel: bool) -> str:
    """A key of the schema in one spelling; anything else (such as the word prompt_completion) as it is."""
    name = to_snake(key)
    if name not in _field_names():
        return key
    return to_camel(name) if camel else name


def _speaks_camel(source: Source) -> bool:
    """How a file spells its keys: as most of them say, else as its kind of file does."""
    keys = [key for key in _keys(source.values) if "_" in to_snake(key) and to_snake(key) in _field_names()]
    camel = sum("_" not in key for key in keys)
    return camel > len(keys) - camel if keys else "spec" in source.values


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield str(key)
            yield from _keys(child)
    elif isinstance(value, list):
        for child in value:
            yield from _keys(child)


@lru_cache(maxsize=1)
def _field_names() -> frozenset[str]:
    """Every key of the schema, in snake_case."""
    models, names = [Strict], set[str]()
    while models:
        model = models.pop()
        models += model.__subclasses__()
        names |= set(model.model_fields)
    return frozenset(names)
