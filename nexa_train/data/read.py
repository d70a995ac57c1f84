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

from nexa_train.config.spec import DataSpec
from nexa_train.data.stdlib import docstring_rows
from nexa_train.errors import ConfigError, DataError, NexaError, NotFoundError, is_for_good
from nexa_train.store import address, open_store

STDLIB = "stdlib:docstrings"


@dataclass(frozen=True)
class Row:
    """One record and its place, such as `train.jsonl row 12`."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class _Place:
    """Where rows are, and the key of the job that says so."""

    uri: str
    key: str

    def not_found(self, said: str) -> NotFoundError:
        return NotFoundError(f"{self.key}: {self.uri}{said}")

    def unreadable(self, exc: OSError) -> NoReturn:
        """What is there and cannot be read is never left out without a word."""
        kind = NotFoundError if is_for_good(exc) else NexaError
        raise kind(f"{self.key}: {exc.filename} cannot be read: {exc.strerror}") from exc


@dataclass(frozen=True)
class RawData:
    """A data set that was read through once.

    Attributes:
        place: of its rows. digest: SHA-256 over the names and bytes of its files. num_rows: lines that are not blank.
    """

    place: _Place
    digest: str
    num_rows: int

    @property
    def uri(self) -> str:
        """Where it is."""
        return self.place.uri

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of names and lines.

        Raises:
            DataError: a malformed row.
            NexaError: the bytes are others than those of the digest, known after the last row.
        """
        sha = hashlib.sha256()
        for name, number, at, line in _lines(self.place, sha):
            yield _parse(f"{name} row {number}", line, at)
        if sha.hexdigest() != self.digest:
            raise NexaError(f"{self.uri}: changed while it was read; run again once nothing writes there")


def read_rows(uri: str, *, key: str = "data.remote_uri") -> RawData:
    """Read through a JSONL file, a folder of them, an s3:// object or prefix, or `stdlib:docstrings`.

    Args:
        key: of the job, which named it.

    Raises:
        NotFoundError: nothing there. DataError: no row, or rows twice. ConfigError: a URI of another kind.
    """
    sha, place = hashlib.sha256(), _Place(uri, key)
    count = sum(1 for _ in _lines(place, sha))
    if not count:
        raise DataError(f"{uri}: no rows; a data set needs at least one JSON object a line")
    return RawData(place, sha.hexdigest(), count)


def read_splits(data: DataSpec) -> tuple[RawData, RawData | None]:
    """Read through what a job trains on, and what it validates on where that is elsewhere; see `read_rows`."""
    held_out = data.validation.uri
    return read_rows(data.remote_uri), read_rows(held_out, key="data.validation.uri") if held_out else None


def _lines(place: _Place, sha: hashlib._Hash) -> Iterator[tuple[str, int, int, bytes]]:
    """Lines that are not blank: name of the file, number, first byte, the line. `sha` has it all after the last one."""
    for name, file in _files(place):
        inner, at = hashlib.sha256(), 0
        with file:
            # Lines of bytes end at newlines only; those of text also at U+2028 and others, which JSON may hold.
            for number, line in enumerate(file, start=1):
                inner.update(line)
                if line.strip():
                    yield name, number, at, line
                at += len(line)
        sha.update(name.encode() + b"\0" + inner.digest())


def _files(place: _Place) -> Iterator[tuple[str, BinaryIO]]:
    """Names (relative, so that a copy elsewhere has the same digest) and open files, in order of name."""
    uri = place.uri
    if uri == STDLIB:
        yield STDLIB, io.BytesIO(_stdlib())
        return
    named = address.parse(uri)
    if named.is_local and named.path:
        yield from _local(address.local_path(named.path), place)
    elif named.scheme == "s3" and named.host:
        yield from _remote(place, named)
    else:
        raise ConfigError(
            f"{place.key}: {uri} is not supported; use a folder, a .jsonl file or s3://BUCKET/PREFIX, or write "
            "file:///FOLDER"
        )


@cache
def _stdlib() -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in docstring_rows()).encode()


def _local(path: Path, place: _Place) -> Iterator[tuple[str, BinaryIO]]:
    if path.is_file():
        yield path.name, _opened(path, place)
        return
    if not path.is_dir():
        raise place.not_found(f": no such file or folder; give one with --set {place.key}=FILE")
    files = {
        (folder / name).relative_to(path).as_posix(): folder / name
        for folder, names in _folders(path, place)
        for name in names
        if name.endswith(".jsonl")
    }
    if not files:
        raise place.not_found(": the folder holds no *.jsonl file")
    for name, file in sorted(files.items()):  # as a store lists them: by the whole name, not folder by folder
        yield name, _opened(file, place)


def _folders(path: Path, place: _Place) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below, through links too, with the names of their files.

    Not those of a name with two dots in front: in a mounted ConfigMap or Secret they hold once more what the links
    beside them show.

    Raises:
        DataError: links lead to one folder twice, so that its rows would be, or into themselves.
    """
    seen: dict[Path, Path] = {}
    for name, below, names in os.walk(path, onerror=place.unreadable, followlinks=True):
        folder = Path(name)
        if (first := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise DataError(f"{place.key}: {folder} and {first} are the same folder, whose rows would be there twice")
        below[:] = sorted(each for each in below if not each.startswith(".."))
        yield folder, names


def _opened(path: Path, place: _Place) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as exc:
        place.unreadable(exc)


def _remote(place: _Place, named: address.Address) -> Iterator[tuple[str, BinaryIO]]:
    folder, _, name = named.path.removeprefix("/").rpartition("/")
    store = open_store(f"s3://{named.host}/{folder}" if folder else f"s3://{named.host}")
    if name.endswith(".jsonl"):
        yield name, store.open(name)
        return
    prefix = f"{name}/" if name else ""
    keys = [item.key for item in store.list(prefix) if item.key.endswith(".jsonl")]
    if not keys:
        raise place.not_found(": holds no *.jsonl object")
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
