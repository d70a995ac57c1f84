"""The files of a checkpoint: which rank writes which tensor where, safetensors streamed out, and read by parts.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the little-endian length of a JSON header, the
header, which gives type, shape and byte range of each tensor, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexa_train.errors import DamagedError, ForeignError

MODEL, ADAPTER, OPTIMIZER, STATE = "model", "adapter_model", "optimizer", "state.json"

SHARD_BYTES = 4 << 30
"""Largest file: below what a store takes in one conditional write (5 GiB on S3)."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_CHUNK_BYTES = 1 << 20  # hashed twice and written while it is in the processor's cache


@dataclass(frozen=True, order=True)
class Entry:
    """One whole tensor: its name, its type as safetensors spells it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Of one element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class Shard:
    """One file: the rank that writes it, and the tensors in it in order."""

    file: str
    stem: str
    owner: int
    entries: tuple[Entry, ...]


def plan_shards(stems: Mapping[str, Sequence[Entry]], world: int, *, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Share all tensors out over the ranks, the largest first to the one with fewest bytes so far. Pure.

    Args:
        stems: the tensors of each kind of file: MODEL or ADAPTER, and OPTIMIZER.
    """
    loads, owned = [0] * world, {(stem, rank): list[Entry]() for stem in stems for rank in range(world)}
    sized = [(stem != ADAPTER, -entry.num_bytes, stem, entry) for stem, entries in stems.items() for entry in entries]
    for splits, negative, stem, entry in sorted(sized):
        owner = loads.index(min(loads)) if splits else 0
        loads[owner] -= negative
        owned[stem, owner].append(entry)
    shards = []
    for stem in stems:
        limit = math.inf if stem == ADAPTER else shard_bytes
        parts = [(rank, part) for rank in range(world) for part in _split(owned[stem, rank], limit)]
        for number, (rank, part) in enumerate(parts, start=1):
            whole = len(parts) == 1
            file = f"{stem}.safetensors" if whole else f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
            shards.append(Shard(file, stem, rank, tuple(part)))
    return shards


def _split(entries: Sequence[Entry], limit: float) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    # Wide types first, so that every tensor is aligned; then by name.
    for entry in sorted(entries, key=lambda entry: (-entry.item_bytes, entry.name)):
        if part and sum(other.num_bytes for other in part) + entry.num_bytes > limit:
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def index_files(shards: Sequence[Shard]) -> dict[str, bytes]:
    """STEM.safetensors.index.json of every kind of file that is split."""
    indices = {}
    for stem in dict.fromkeys(shard.stem for shard in shards):
        own = [shard for shard in shards if shard.stem == stem]
        if len(own) > 1:
            total = sum(entry.num_bytes for shard in own for entry in shard.entries)
            places = {entry.name: shard.file for shard in own for entry in shard.entries}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            indices[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    return indices


def write_shard(path: Path, shard: Shard, tensors: Iterator[Tensor]) -> tuple[str, dict[str, str]]:
    """Stream whole tensors, as many as the shard has, into a file.

    Returns:
        SHA-256 of the file, and of the bytes of each tensor of the weights, for `weights_digest`.
    """
    sha, digests = hashlib.sha256(), {}
    with path.open("wb") as file:
        header = _header(shard.entries)
        sha.update(header)
        file.write(header)
        for entry, tensor in zip(shard.entries, tensors, strict=False):
            own = None if shard.stem == OPTIMIZER else hashlib.sha256()
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                sha.update(chunk)
                file.write(chunk)
                if own is not None:
                    own.update(chunk)
            if own is not None:
                digests[entry.name] = own.hexdigest()
    return sha.hexdigest(), digests


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def weights_digest(entries: Sequence[Entry], digests: Mapping[str, str]) -> str:
    """SHA-256 over name, type, shape and SHA-256 of the bytes of each tensor, in order of name.

    A tree, so that owners hash in parallel: equal bits give an equal digest, whatever the world size and the files.
    """
    lines = [[entry.name, entry.dtype, entry.shape, digests[entry.name]] for entry in sorted(entries)]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()


class Saved:
    """A fetched checkpoint, read tensor by tensor; a rank reads the rows it needs and no others.

    Attributes:
        step: optimiser steps done. names: of all tensors, the weights' and the optimiser's.
    """

    def __init__(self, folder: Path) -> None:
        """Open it; no tensor is read yet.

        Its bytes were checked when it was fetched. So what is wrong with it now was committed like that, and another
        attempt would meet it again; only a file that cannot be read may be this machine's fault.

        Raises:
            ForeignError: a file is missing, or is not what its name says.
            DamagedError: a file cannot be read.
        """
        self.folder = folder
        self.step = _step(folder / STATE)
        self._places: dict[str, Any] = {}
        stems = (MODEL, OPTIMIZER) if list(folder.glob(f"{MODEL}*.safetensors")) else (ADAPTER, OPTIMIZER)
        for stem in stems:
            self._open(stem)

    @property
    def names(self) -> set[str]:
        """See the class."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along dim 0, as they were stored, on the CPU."""
        rows: Tensor = self._slice(name)[start:stop]
        return rows

    def whole(self, name: str) -> Tensor:
        """All of one tensor."""
        return self.elements(name, 0, math.prod(self.shape(name))).view(self.shape(name))

    def elements(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor; only the rows that hold them are read."""
        shape = self.shape(name)
        if not shape:
            scalar: Tensor = self._file(name).get_tensor(name)
            return scalar.reshape(-1)[start : start + count]
        width = max(1, math.prod(shape[1:]))
        first = start // width
        rows = self.rows(name, first, -(-(start + count) // width)).reshape(-1)
        return rows[start - first * width : start - first * width + count]

    def _open(self, stem: str) -> None:
        files = [self.folder / f"{stem}.safetensors", *sorted(self.folder.glob(f"{stem}-*-of-*.safetensors"))]
        found = [file for file in files if file.is_file()]
        if not found:
            raise ForeignError(f"checkpoint {self.folder}: {stem}.safetensors is not in it")
        for path in found:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as exc:
                raise ForeignError(f"checkpoint {self.folder}: {path.name} is not safetensors: {exc}") from exc
            except OSError as exc:
                raise DamagedError(f"checkpoint {self.folder}: {path.name} cannot be read: {exc}") from exc
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            for name in names:
                if name in self._places:
                    raise ForeignError(f"checkpoint {self.folder}: {name} is in it twice")
                self._places[name] = file

    def _file(self, name: str) -> Any:
        if name not in self._places:
            raise ForeignError(f"checkpoint {self.folder}: {name} is not in it")
        return self._places[name]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)


def _step(path: Path) -> int:
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
        if type(step) is not int or step < 1:
            raise ValueError(f"step is {step!r}")
    except (FileNotFoundError, ValueError, TypeError, KeyError) as exc:
        raise ForeignError(f"checkpoint {path.parent}: {path.name} does not hold the step: {exc!r}") from exc
    except OSError as exc:
        raise DamagedError(f"checkpoint {path.parent}: {path.name} cannot be read: {exc}") from exc
    return step
