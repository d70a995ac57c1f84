"""Saving in the background: gather pieces to owners, write, hash, upload, commit; training goes on meanwhile.

Before: `pipeline` hands over what a backend staged. After: `artifact.publish` has committed it. Between ranks go
rows of tensors, and JSON as bytes, over a process group of its own: collectives of a save never meet training's.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexa_train import errors
from nexa_train.artifact.manifest import FileEntry, ManifestDraft
from nexa_train.artifact.publish import Publisher, manifest_uri
from nexa_train.artifact.retention import apply_retention
from nexa_train.backends.base import Piece, Staged
from nexa_train.checkpoint.files import (
    ADAPTER,
    DTYPES,
    MODEL,
    OPTIMIZER,
    SHARD_BYTES,
    STATE,
    Entry,
    Shard,
    index_files,
    plan_shards,
    weights_digest,
    write_shard,
)
from nexa_train.config.protocol import CheckpointRef
from nexa_train.errors import NexaError
from nexa_train.rundir import RunDir

PATIENCE = timedelta(days=1)
"""Of a rank with what another does alone, such as an upload; one that died is noticed at once, by its closed
connections."""

_UPLOADS = 2


@dataclass(frozen=True)
class Done:
    """A save that succeeded, the same on every rank but for `seconds`, which it took in the background."""

    checkpoint: CheckpointRef
    seconds: float


@dataclass(frozen=True)
class _Span:
    """Elements [start, start + count) of a tensor are staged on this rank."""

    rank: int
    start: int
    count: int


_Stems = Mapping[str, Mapping[str, Piece]]
_Spans = dict[tuple[str, Entry], list[_Span]]


class Saver:
    """Publishes what the ranks staged, one step at a time. Calls are made on every rank, in the same order.

    Args:
        publisher: with the same nonce on every rank. keep_last: checkpoints to keep; None: all.
    """

    def __init__(
        self,
        publisher: Publisher,
        rundir: RunDir,
        *,
        rank: int = 0,
        world: int = 1,
        keep_last: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.publisher, self.rundir, self.keep_last, self.shard_bytes = publisher, rundir, keep_last, shard_bytes
        self.wire = Wire(rank, world)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.flight: Future[Done] | None = None

    def start(self, staged: Staged, small: Mapping[str, bytes], draft: ManifestDraft) -> None:
        """Save in the background; `wait` must have been called for the save before.

        Args:
            small: further files, by name; rank 0's are written. draft: of the manifest; rank 0's is committed.
        """
        assert self.flight is None  # noqa: S101 - its memory may be that of `staged`
        self.flight = self.thread.submit(self._save, staged, small, draft)

    @property
    def is_done(self) -> bool:
        """Whether a save is over and its end was not fetched by `wait` yet."""
        return self.flight is not None and self.flight.done()

    @property
    def has_failed(self) -> bool:
        """Whether it is over without success."""
        return self.flight is not None and self.flight.done() and self.flight.exception() is not None

    def wait(self) -> Done | None:
        """The end of the save in flight; None: there is none.

        Raises:
            NexaError: what any rank's save failed with, on every rank.
        """
        flight, self.flight = self.flight, None
        return flight.result() if flight else None

    def close(self) -> None:
        """Let the save in flight come to its end; where nobody waits for it, its failure is told here."""
        self.thread.shutdown()
        if self.flight is not None and (exc := self.flight.exception()):
            print(f"nexa: warning: the last save failed, too: {exc}", file=sys.stderr, flush=True)

    def _save(self, staged: Staged, small: Mapping[str, bytes], draft: ManifestDraft) -> Done:
        began = time.monotonic()
        weights = ADAPTER if "adapter_config.json" in small else MODEL
        stems = {weights: staged.weights, OPTIMIZER: staged.optimizer}
        spans = _spans(self.wire.all_gather(_described(stems)))
        entries = {stem: [entry for kind, entry in spans if kind == stem] for stem in stems}
        shards = plan_shards(entries, self.wire.world, shard_bytes=self.shard_bytes)
        if self.wire.rank == 0:
            small = {**small, **index_files(shards), STATE: json.dumps({"step": staged.step}).encode()}
        gather = _Gather(self.wire, stems, spans, shards)
        report = self._write(staged, shards, small, gather)
        reports = self.wire.all_gather(report)
        if any("error" in each for each in reports):
            self._take_back(staged.step, shards, small)
        verdict = self._commit(staged.step, reports, entries[weights], draft)
        return Done(CheckpointRef.model_validate(verdict), time.monotonic() - began)

    def _write(
        self, staged: Staged, shards: Sequence[Shard], small: Mapping[str, bytes], gather: _Gather
    ) -> dict[str, Any]:
        """Write and upload what this rank owns; what became of it. A failure must reach the others, not hang them."""
        folder, tensors = self.rundir.saving(staged.step, self.wire.rank), gather.tensors()
        own = [shard for shard in shards if shard.owner == self.wire.rank]
        try:
            staged.ready()
            rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return self._upload(staged.step, own, small, tensors)
        except Exception as exc:  # noqa: BLE001 - told to all ranks and raised on them
            return _failure(exc)
        finally:
            for _ in tensors:  # the others still wait for this rank's pieces
                pass
            rmtree(folder, ignore_errors=True)

    def _upload(
        self, step: int, shards: Sequence[Shard], small: Mapping[str, bytes], tensors: Iterator[Tensor]
    ) -> dict[str, Any]:
        """Upload each file while the next one is written."""
        digests: dict[str, str] = {}
        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload") as pool:
            uploads = []
            if self.wire.rank == 0:
                uploads += [pool.submit(self.publisher.upload, step, *item) for item in sorted(small.items())]
            for shard in shards:
                path = self.rundir.saving(step, self.wire.rank) / shard.file
                sha256, own = write_shard(path, shard, tensors)
                digests |= own
                uploads.append(pool.submit(self.publisher.upload, step, shard.file, path, sha256=sha256))
            files = [upload.result().to_dict() for upload in uploads]
        return {"files": files, "digests": digests}

    def _take_back(self, step: int, shards: Sequence[Shard], small: Mapping[str, bytes]) -> None:
        """Delete what this rank uploaded of a save that nobody will try to commit.

        Nobody else may, while this attempt could be alive; and on a full disk it would be in the way of the next one.
        It ends with the first thing that fails, as the save has failed already and its cause is to be told.
        """
        own = [shard.file for shard in shards if shard.owner == self.wire.rank]
        with suppress(Exception):
            self.publisher.take_back(step, [*own, *(small if self.wire.rank == 0 else ())])

    def _commit(
        self, step: int, reports: Sequence[dict[str, Any]], weights: Sequence[Entry], draft: ManifestDraft
    ) -> dict[str, Any]:
        """Rank 0 commits what all ranks uploaded; every rank learns how it ended."""
        verdict = next((report for report in reports if "error" in report), {})
        if self.wire.rank == 0 and not verdict:
            digests = {name: sha for report in reports for name, sha in report["digests"].items()}
            files = [FileEntry.from_dict(file) for report in reports for file in report["files"]]
            try:
                draft = replace(draft, weights_digest=weights_digest(weights, digests))
                committed = self.publisher.commit(step, files, draft)
                self._thin_out()
            except Exception as exc:  # noqa: BLE001 - as in `_write`
                verdict = _failure(exc)
            else:
                uri = manifest_uri(self.publisher.store, committed)
                verdict = {"step": step, "uri": uri, "digest": committed.digest, "weights_digest": draft.weights_digest}
        verdict = dict(self.wire.all_gather(verdict)[0])
        if "error" in verdict:
            raise _revived(**verdict)
        return verdict

    def _thin_out(self) -> None:
        """What is committed stays committed, whatever the store says or holds that nobody expected."""
        try:
            apply_retention(self.publisher.store, self.publisher.run_id, self.keep_last)
        except NexaError as exc:
            print(f"nexa: warning: old checkpoints stay until the next save: {exc}", file=sys.stderr, flush=True)


class Wire:
    """What the ranks' savers say to each other. No pickles: JSON and raw rows."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None

    def all_gather(self, message: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        if self.world == 1:
            return [message]
        content = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        mine = torch.cat([content, torch.zeros(longest - len(content), dtype=torch.uint8)])
        dist.all_gather(padded, mine, group=self.group)
        return [
            json.loads(got[: int(size)].numpy().tobytes().decode()) for got, size in zip(padded, sizes, strict=True)
        ]

    def send(self, tensor: Tensor, to: int, tag: int) -> dist.Work | None:
        """Begin to send bytes."""
        return dist.isend(tensor, to, group=self.group, tag=tag)

    def receive(self, into: Tensor, source: int, tag: int) -> dist.Work | None:
        """Begin to receive bytes."""
        return dist.irecv(into, source, group=self.group, tag=tag)


class _Gather:
    """Pieces -> whole tensors at their owners, one tensor an owner at a time, so that memory stays small."""

    def __init__(self, wire: Wire, stems: _Stems, spans: _Spans, shards: Sequence[Shard]) -> None:
        self.wire, self.stems, self.spans = wire, stems, spans
        self.owned = [
            [(shard.stem, entry) for shard in shards if shard.owner == rank for entry in shard.entries]
            for rank in range(wire.world)
        ]

    def tensors(self) -> Iterator[Tensor]:
        """What this rank owns, in the order of its shards. Must be taken to its end: it also sends."""
        for turn, items in enumerate(zip_longest(*self.owned)):
            whole: Tensor | None = None
            receives: list[dist.Work | None] = []
            sends: list[dist.Work | None] = []
            for owner, item in enumerate(items):
                if item is None:
                    continue
                tag = turn * self.wire.world + owner
                if owner == self.wire.rank:
                    whole, receives = self._receive(item, tag)
                elif (piece := self._piece(item)) is not None and piece.tensor.numel():
                    sends.append(self.wire.send(_bytes(piece.tensor), owner, tag))
            _finish(receives)
            if whole is not None:
                yield whole
            _finish(sends)

    def _receive(self, item: tuple[str, Entry], tag: int) -> tuple[Tensor, list[dist.Work | None]]:
        """This rank's own tensor, whole once the works that are returned too are done."""
        spans = self.spans[item]
        mine = self._piece(item)
        if mine is not None and [span.rank for span in spans] == [self.wire.rank]:
            return mine.tensor, []
        whole, works = torch.empty(item[1].num_bytes, dtype=torch.uint8), []
        size = item[1].item_bytes
        for span in spans:
            part = whole[span.start * size : (span.start + span.count) * size]
            if span.rank == self.wire.rank and mine is not None:
                part.copy_(_bytes(mine.tensor))
            else:
                works.append(self.wire.receive(part, span.rank, tag))
        return whole, works

    def _piece(self, item: tuple[str, Entry]) -> Piece | None:
        stem, entry = item
        return self.stems[stem].get(entry.name)


def _spans(described: Sequence[list[Any]]) -> _Spans:
    """Where the elements of each tensor are, from what all ranks staged.

    Raises:
        NexaError: a tensor is of no type that can be saved, or not all of it is staged exactly once.
    """
    found: _Spans = {}
    for rank, pieces in enumerate(described):
        for stem, name, dtype, shape, start, count in pieces:
            spans = found.setdefault((stem, Entry(name, dtype, tuple(shape))), [])
            if count:
                spans.append(_Span(rank, start, count))
    for (_, entry), spans in found.items():
        if entry.dtype not in DTYPES.values():
            raise NexaError(f"{entry.name} is {entry.dtype}, which a checkpoint cannot hold")
        spans.sort(key=lambda span: span.start)
        end = 0
        for span in spans:
            end = span.start + span.count if span.start == end else -1
        if end != math.prod(entry.shape):
            raise NexaError(f"{entry.name} {list(entry.shape)} is not staged exactly once over the ranks: {spans}")
    return found


def _described(stems: _Stems) -> list[list[Any]]:
    """Of each piece: kind of file, name, type, shape of the whole, first element, number of elements."""
    return [
        [stem, name, DTYPES.get(tensor.dtype, str(tensor.dtype)), piece.shape, piece.start, tensor.numel()]
        for stem, pieces in stems.items()
        for name, piece in pieces.items()
        for tensor in [piece.tensor]
    ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _finish(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:  # this rank is in the group
            work.wait()


def _failure(exc: Exception) -> dict[str, Any]:
    if isinstance(exc, NexaError):
        return {"error": type(exc).__name__, "message": str(exc)}
    traceback.print_exc()  # nobody expected it: only its stack says where it was
    return {"error": "NexaError", "message": f"saving failed: {type(exc).__name__}: {exc}"}


def _revived(error: str, message: str) -> NexaError:
    kind: type[NexaError] = getattr(errors, error)
    return kind(message)
