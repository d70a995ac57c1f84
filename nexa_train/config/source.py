"""YAML text -> plain values, remembering on which line each key stands.

First stage of loading; `load.py` comes next. A duplicate key is an error here, because YAML's own reading
would drop one of the two without a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nexa_train.errors import ConfigError, NotFoundError

Path_ = tuple[str | int, ...]

_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass(frozen=True)
class Source:
    """One YAML document and where its keys came from."""

    name: str
    values: dict[str, Any]
    lines: dict[Path_, int] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """`file:line` of the key, or of its nearest parent that is written down."""
        for end in range(len(path), -1, -1):
            if (line := self.lines.get(path[:end])) is not None:
                return f"{self.name}:{line}"
        return self.name


def read_source(path: Path) -> Source:
    """Read one YAML file.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: not YAML, not exactly one mapping, or a key stands there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise NotFoundError(f"{path}: no such file; give the path of a job file or --config-mode") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {exc}") from exc
    return parse_source(text, name=str(path))


def parse_source(text: str, *, name: str) -> Source:
    """Parse one YAML document; see `read_source`."""
    try:
        return _parsed(text, name)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deep to be read") from None


def _parsed(text: str, name: str) -> Source:
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or str(exc)
        raise ConfigError(f"{name}{line}: not valid YAML: {problem}") from exc
    if len(documents) != 1 or not isinstance(documents[0], yaml.MappingNode):
        raise ConfigError(f"{name}: expected one mapping (key: value), found {_shape(documents)}")
    lines: dict[Path_, int] = {}
    _note_lines(documents[0], (), lines, name, inside=())
    loader = yaml.SafeLoader("")
    try:
        values = loader.construct_document(documents[0])
    except (yaml.YAMLError, ValueError) as exc:  # ValueError: of what looks like a date and is none, 2024-02-30
        raise ConfigError(f"{name}: not valid YAML: {exc}") from exc
    return Source(name, values, lines)


def _shape(documents: list[yaml.Node]) -> str:
    if len(documents) != 1:
        return f"{len(documents)} documents"
    return "a list" if isinstance(documents[0], yaml.SequenceNode) else "a single value"


def _note_lines(
    node: yaml.Node, path: Path_, lines: dict[Path_, int], name: str, inside: tuple[yaml.Node, ...]
) -> None:
    if any(node is outer for outer in inside):
        raise ConfigError(
            f"{name}:{node.start_mark.line + 1}: {'.'.join(map(str, path))}: an alias inside its own anchor"
        )
    inside = (*inside, node)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{name}:{line}: a key is a list or a mapping; expected plain text")
            if key.tag not in _TEXT_TAGS:
                raise ConfigError(f"{name}:{line}: the key {key.value} is not text to YAML; put it in quotes")
            if key.value in seen:
                dotted = ".".join(map(str, (*path, key.value)))
                raise ConfigError(f"{name}:{line}: {dotted}: given twice, first on line {seen[key.value]}; keep one")
            seen[key.value] = line
            lines[(*path, key.value)] = line
            _note_lines(value, (*path, key.value), lines, name, inside)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _note_lines(value, (*path, index), lines, name, inside)
