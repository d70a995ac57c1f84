"""URI -> rows. First stage of the data pipeline; `render.py` comes next.

Rows are read twice, once for their digest and once to be used, and never stand in memory together. A row carries
where it came from, so that every later complaint can name file and row.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

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
    """A data set that was read through once.

    Attributes:
        digest: SHA-256 over the names and bytes of its files. num_rows: lines that are not blank.
    """

    uri: str
    digest: str
    num_rows: int

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of names and lines.

        Raises:
            DataError: a malformed row; or the bytes are others than those of the digest, known after the last row.
        """
        sha = hashlib.sha256()
        for name, number, at, line in _lines(self.uri, sha):
            yield _parse(f"{name} row {number}", line, at)
        if sha.hexdigest() != self.digest:
            raise DataError(f"{self.uri}: changed while it was read; run again once nothing writes there")


def read_rows(uri: str) -> RawData:
    """Read through a JSONL file, a folder of them, an s3:// object or prefix, or `stdlib:docstrings`.

    Raises:
        NotFoundError: nothing there. DataError: no row. ConfigError: a URI of another kind.
    """
    sha = hashlib.sha256()
    count = sum(1 for _ in _lines(uri, sha))
    if not count:
        raise DataError(f"{uri}: no rows; a data set needs at least one JSON object a line")
    return RawData(uri, sha.hexdigest(), count)


def _lines(uri: str, sha: hashlib._Hash) -> Iterator[tuple[str, int, int, bytes]]:
    """Lines that are not blank: name of the file, number, first byte, the line. `sha` has it all after the last one."""
    for name, file in _files(uri):
        inner, at = hashlib.sha256(), 0
        with file:
            # Lines of bytes end at newlines only; those of text also at U+2028 and others, which JSON may hold.
            for number, line in enumerate(file, start=1):
                inner.update(line)
                if line.strip():
                    yield name, number, at, line
                at += len(line)
        sha.update(name.encode() + b"\0" + inner.digest())


def _files(uri: str) -> Iterator[tuple[str, BinaryIO]]:
    """Names (relative, so that a copy elsewhere has the same digest) and open files, in order of name."""
    if uri == STDLIB:
        yield STDLIB, io.BytesIO(_stdlib())
    elif uri.startswith("s3://"):
        yield from _remote(uri)
    elif "://" in uri and not uri.startswith("file://"):
        raise ConfigError(f"data.remote_uri: {uri} is not supported; use a folder, a .jsonl file or s3://")
    else:
        yield from _local(Path(uri.removeprefix("file://")).expanduser(), uri)


@cache
def _stdlib() -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in docstring_rows()).encode()


def _local(path: Path, uri: str) -> Iterator[tuple[str, BinaryIO]]:
    if path.is_file():
        yield path.name, _opened(path)
        return
    if not path.is_dir():
        raise NotFoundError(f"data.remote_uri: {uri}: no such file or folder; give one with --set data.remote_uri=FILE")
    below = os.walk(path, onerror=_refuse)
    files = sorted(Path(folder, name) for folder, _, names in below for name in names if name.endswith(".jsonl"))
    if not files:
        raise NotFoundError(f"data.remote_uri: folder {uri} holds no *.jsonl file")
    for file in files:
        yield file.relative_to(path).as_posix(), _opened(file)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as exc:
        _refuse(exc)


def _refuse(exc: OSError) -> NoReturn:
    """What is there and cannot be read is never left out without a word."""
    raise NotFoundError(f"data.remote_uri: {exc.filename} cannot be read: {exc.strerror}") from exc


def _remote(uri: str) -> Iterator[tuple[str, BinaryIO]]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    folder, _, name = key.rpartition("/")
    store = open_store(f"s3://{bucket}/{folder}" if folder else f"s3://{bucket}")
    if name.endswith(".jsonl"):
        yield name, store.open(name)
        return
    prefix = f"{name}/" if name else ""
    keys = [item.key for item in store.list(prefix) if item.key.endswith(".jsonl")]
    if not keys:
        raise NotFoundError(f"data.remote_uri: {uri} holds no *.jsonl object")
    for each in keys:
        yield each.removeprefix(prefix), store.open(each)


def _parse(where: str, line: bytes, at: int) -> Row:
    try:
        text = line.decode("utf-8")
        values = json.loads(text)
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: not UTF-8 text (byte {at + exc.start})") from exc
    except json.JSONDecodeError as exc:
        raise DataError(f"{where}: not valid JSON: {exc.msg} at column {exc.colno}") from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits; lists in lists in lists
        raise DataError(f"{where}: JSON beyond what can be read: {exc}") from exc
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(values).__name__}")
    if "\\u" in text and not _is_text(values):
        raise DataError(f"{where}: holds half a character: a \\ud800 to \\udfff without its other half")
    return Row(values, where)


def _is_text(values: dict[str, Any]) -> bool:
    """Whether every string has an encoding; JSON's escapes can write lone surrogates, which have none."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
