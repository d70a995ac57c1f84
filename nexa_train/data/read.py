"""URI -> rows. First stage of the data pipeline; `render.py` comes next.

A row carries where it came from, so that every later complaint can name file and row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexa_train.data.stdlib import docstring_rows
from nexa_train.errors import ConfigError, DataError, NotFoundError
from nexa_train.store import open_store

STDLIB = "stdlib:docstrings"


@dataclass(frozen=True)
class Row:
    """One record and its place, such as `train.jsonl row 12`."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class RawData:
    """All rows of a data set and the SHA-256 of the bytes they were read from."""

    uri: str
    digest: str
    rows: list[Row]


def read_rows(uri: str) -> RawData:
    """Read a JSONL file, a folder of them, an s3:// object or prefix, or `stdlib:docstrings`.

    Raises:
        NotFoundError: nothing there. DataError: a malformed or no row. ConfigError: a URI of another kind.
    """
    sha = hashlib.sha256()
    rows: list[Row] = []
    for name, data in _blobs(uri):
        sha.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        rows += _parse(name, data)
    if not rows:
        raise DataError(f"{uri}: no rows; a data set needs at least one JSON object a line")
    return RawData(uri, sha.hexdigest(), rows)


def _blobs(uri: str) -> Iterator[tuple[str, bytes]]:
    """Names (relative, so that a copy elsewhere has the same digest) and bytes, in order of name."""
    if uri == STDLIB:
        lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in docstring_rows())
        yield STDLIB, "\n".join(lines).encode()
    elif uri.startswith("s3://"):
        yield from _remote(uri)
    elif "://" in uri and not uri.startswith("file://"):
        raise ConfigError(f"data.remote_uri: {uri} is not supported; use a folder, a .jsonl file or s3://")
    else:
        yield from _local(Path(uri.removeprefix("file://")).expanduser(), uri)


def _local(path: Path, uri: str) -> Iterator[tuple[str, bytes]]:
    if path.is_file():
        yield path.name, path.read_bytes()
        return
    if not path.is_dir():
        raise NotFoundError(f"data.remote_uri: {uri}: no such file or folder; give one with --set data.remote_uri=FILE")
    files = sorted(file for file in path.rglob("*.jsonl") if file.is_file())
    if not files:
        raise NotFoundError(f"data.remote_uri: folder {uri} holds no *.jsonl file")
    for file in files:
        yield file.relative_to(path).as_posix(), file.read_bytes()


def _remote(uri: str) -> Iterator[tuple[str, bytes]]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    folder, _, name = key.rpartition("/")
    store = open_store(f"s3://{bucket}/{folder}" if folder else f"s3://{bucket}")
    if name.endswith(".jsonl"):
        with store.open(name) as file:
            yield name, file.read()
        return
    prefix = f"{name}/" if name else ""
    keys = [item.key for item in store.list(prefix) if item.key.endswith(".jsonl")]
    if not keys:
        raise NotFoundError(f"data.remote_uri: {uri} holds no *.jsonl object")
    for each in keys:
        with store.open(each) as file:
            yield each.removeprefix(prefix), file.read()


def _parse(name: str, data: bytes) -> Iterator[Row]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        row = data[: exc.start].count(b"\n") + 1
        raise DataError(f"{name} row {row}: not UTF-8 text (byte {exc.start})") from exc
    # Not splitlines(): it also breaks at U+2028 and others, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name} row {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"{where}: not valid JSON: {exc.msg} at column {exc.colno}") from exc
        except (ValueError, RecursionError) as exc:  # a number of thousands of digits; lists in lists in lists
            raise DataError(f"{where}: JSON beyond what can be read: {exc}") from exc
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(values).__name__}")
        if "\\u" in line and not _is_text(values):
            raise DataError(f"{where}: holds half a character: a \\ud800 to \\udfff without its other half")
        yield Row(values, where)


def _is_text(values: dict[str, Any]) -> bool:
    """Whether every string has an encoding; JSON's escapes can write lone surrogates, which have none."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
