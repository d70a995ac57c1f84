"""Rows -> one prepared data set on disk: tokenised, masked, packed, memory-mapped. Last stage before the ranks.

The folder is keyed by everything that decides its bytes (rows, tokenizer, template, mask, packing, length,
split), so it is made once and every rank of this machine maps the same pages. Layout, all little-endian:

    train.ids.npy      int32 [tokens]     samples one after another
    train.targets.npy  uint8 [tokens]     1: this token is predicted, and counts in the loss
    train.starts.npy   int64 [samples+1]  where each sample begins
    train.bins.npy     int64 [bins+1]     samples of each sequence (without packing one each; of a preference
                                          two, the chosen and the rejected)
    validation.*       the same
    audit.json         what was counted on the way, and the SHA-256 of each file

Every byte is checked whenever it is found prepared: a damaged folder is made anew and never trained on. Rows go
through in chunks, so that memory holds the lengths of all samples, but the texts and tokens of a few.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nexa_train.artifact.manifest import digest_of
from nexa_train.cache import cache_folder, discard, made_whole
from nexa_train.config.spec import JobSpec
from nexa_train.data.audit import SplitAudit, report, warnings
from nexa_train.data.cursor import permutation
from nexa_train.data.pack import pack
from nexa_train.data.read import RawData, read_splits
from nexa_train.data.render import Rendered, render_rows
from nexa_train.data.tokenise import Samples, encode, mask
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import DataError

LAYOUT_VERSION = 4
SPLITS = ("train", "validation")
PARTS: dict[str, np.dtype[Any]] = {"ids": np.dtype("<i4"), "targets": np.dtype("u1")}
CHUNK_CHARS = 250_000
"""Of text that go through the tokenizer together: a tenth of a second on one core, little memory beside a model."""


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: see the module.
        digest: of the rows' bytes. key: of everything that decides the prepared bytes.
        notes: what a person should know of it, a line each.
    """

    folder: Path
    uri: str
    digest: str
    key: str
    audit: dict[str, SplitAudit]
    notes: tuple[str, ...] = ()

    @property
    def num_sequences(self) -> int:
        """Sequences to train on, an epoch."""
        return self.audit["train"].sequences


def prepare(spec: JobSpec, tokenizer: ChatTokenizer) -> Prepared:
    """Prepare the job's data, or find it prepared.

    Raises:
        NotFoundError, ConfigError, DataError: see `read_splits` and `render_rows`; DataError also where no
            sample is left to learn from.
    """
    raw, held_out = read_splits(spec.data)
    digest = raw.digest if held_out is None else digest_of([raw.digest, held_out.digest])
    key = digest_of(_key(spec, tokenizer, digest))
    folder = cache_folder("data") / key[:32]
    notes = []
    if problem := _damage(folder):
        notes.append(f"warning: the prepared data in {folder} was damaged and is made anew: {problem}")
        discard(folder)
    if not folder.is_dir():
        with made_whole(folder) as draft:
            audits = _make(draft, spec, tokenizer, raw, held_out)
            _seal(draft, audits)
    audit = {split: SplitAudit(**counts) for split, counts in _read_seal(folder)["splits"].items()}
    notes += report(audit, spec)
    notes += [f"warning: {line}" for line in warnings(audit, spec, tokenizer)]
    return Prepared(folder, raw.uri, digest, key, audit, tuple(notes))


def held_out_rows(spec: JobSpec, raw: RawData) -> np.ndarray:
    """Which rows are held out for validation: bool [rows], chosen by the seed.

    Raises:
        DataError: nothing would be left to train on.
    """
    wanted, total = spec.data.validation, raw.num_rows
    count = wanted.rows or (max(1, round(wanted.fraction * total)) if wanted.fraction else 0)
    if count >= total:
        raise DataError(f"{raw.uri}: {total} rows, of which data.validation takes {count}: none is left to train on")
    chosen = np.zeros(total, dtype=bool)
    if count:
        chosen[permutation(total, seed=spec.training.seed, epoch=-1)[:count]] = True
    return chosen


def _key(spec: JobSpec, tokenizer: ChatTokenizer, digest: str) -> dict[str, object]:
    return {
        "layout": LAYOUT_VERSION,
        "rows": digest,
        "tokenizer": tokenizer.digest,
        "tokens": tokenizer.fast.get_vocab_size(with_added_tokens=True),
        "data": spec.data.model_dump(mode="json", include={"format", "columns", "packing", "validation"}),
        "method": spec.method.model_dump(mode="json"),
        "max_seq_len": spec.model.max_seq_len,
        "seed": spec.training.seed,
    }


def _make(
    folder: Path, spec: JobSpec, tokenizer: ChatTokenizer, raw: RawData, held_out: RawData | None
) -> dict[str, SplitAudit]:
    a_row = 2 if spec.data.format == "preference" else 1
    rows = _rendered(spec, tokenizer, raw, held_out, a_row)
    with ExitStack() as stack:
        splits = {split: stack.enter_context(_Split(folder, split)) for split in SPLITS}
        for split, tokenised in encode(_chunks(rows), tokenizer):
            splits[split].add(mask(tokenised, tokenizer, limit=spec.model.max_seq_len, a_row=a_row))
        return {split: each.lay_out(spec, a_row) for split, each in splits.items()}


def _rendered(
    spec: JobSpec, tokenizer: ChatTokenizer, raw: RawData, held_out: RawData | None, a_row: int
) -> Iterator[tuple[str, list[Rendered]]]:
    """The texts of each row with the split that it belongs to."""

    def rows(source: RawData) -> Iterator[list[Rendered]]:
        texts = render_rows(source.rows(), data=spec.data, method=spec.method, tokenizer=tokenizer)
        return map(list, zip(*[texts] * a_row, strict=True))

    if held_out is not None:
        yield from (("train", texts) for texts in rows(raw))
        yield from (("validation", texts) for texts in rows(held_out))
        return
    # Rows lead, to their end: only there is it known that they are those which were counted.
    held = chain(held_out_rows(spec, raw).tolist(), repeat(False))
    yield from (("validation" if chosen else "train", texts) for texts, chosen in zip(rows(raw), held, strict=False))


def _chunks(rows: Iterable[tuple[str, list[Rendered]]]) -> Iterator[tuple[str, list[Rendered]]]:
    """Texts of one split together, some CHUNK_CHARS of them at a time; each split stays in the order of its rows."""
    waiting: dict[str, list[Rendered]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for split, texts in rows:
        waiting[split] += texts
        size[split] += sum(len(each.text) for each in texts)
        if size[split] >= CHUNK_CHARS:
            yield split, waiting[split]
            waiting[split], size[split] = [], 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)


class _Split:
    """One split while it is made: samples wait in files in the order of their rows, to be laid out in that of bins."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.counts: Counter[str] = Counter()
        self.lengths = [np.zeros(0, dtype=np.int64)]

    def __enter__(self) -> _Split:
        self.waiting: dict[str, BinaryIO] = {part: self._path(part, "waiting").open("w+b") for part in PARTS}
        return self

    def __exit__(self, *_: object) -> None:
        for part, file in self.waiting.items():
            file.close()
            self._path(part, "waiting").unlink()

    def add(self, samples: Samples) -> None:
        self.counts.update(samples.counts)
        self.lengths.append(samples.lengths)
        for part, file in self.waiting.items():
            getattr(samples, part).tofile(file)

    def lay_out(self, spec: JobSpec, a_row: int) -> SplitAudit:
        """Write the arrays; returns what was counted.

        Raises:
            DataError: there were rows, and all of them were dropped.
        """
        lengths = np.concatenate(self.lengths)
        if self.counts["rows"] and not len(lengths):
            self._refuse(spec, a_row)
        if spec.data.packing and a_row == 1:
            bins = pack(lengths, spec.model.max_seq_len)
            order = np.fromiter((index for members in bins for index in members), dtype=np.int64, count=len(lengths))
            sizes = np.fromiter(map(len, bins), dtype=np.int64, count=len(bins))
        else:
            order = np.arange(len(lengths))
            sizes = np.full(len(lengths) // a_row, a_row)
        for part in PARTS:
            self._save_in_order(part, order, lengths)
        np.save(self._path("starts"), np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)]))
        np.save(self._path("bins"), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
        return SplitAudit(**self.counts, sequences=len(sizes))

    def _save_in_order(self, part: str, order: np.ndarray, lengths: np.ndarray) -> None:
        dtype, total = PARTS[part], int(lengths.sum())
        self.waiting[part].flush()
        waiting = np.memmap(self._path(part, "waiting"), dtype, mode="r") if total else np.zeros(0, dtype)
        ends = np.cumsum(lengths)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (total,)}
        with self._path(part).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for begin, end in zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True):
                file.write(waiting[begin:end].tobytes())

    def _refuse(self, spec: JobSpec, a_row: int) -> None:
        uri = (self.name == "validation" and spec.data.validation.uri) or spec.data.remote_uri
        where = "on one side" if a_row > 1 else "before anything to learn begins"
        raise DataError(
            f"{uri}: all {self.counts['rows']} {self.name} rows are longer than model.max_seq_len "
            f"{spec.model.max_seq_len} {where}; raise it"
        )

    def _path(self, part: str, kind: str = "npy") -> Path:
        return self.folder / f"{self.name}.{part}.{kind}"


def _seal(folder: Path, audits: dict[str, SplitAudit]) -> None:
    splits = {split: asdict(audit) for split, audit in audits.items()}
    files = {path.name: _digest(path) for path in sorted(folder.glob("*.npy"))}
    sealed = {"splits": splits, "files": files}
    text = json.dumps({**sealed, "sha256": digest_of(sealed)}, sort_keys=True)
    (folder / "audit.json").write_text(text, encoding="utf-8")


def _read_seal(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "audit.json").read_text(encoding="utf-8")))


def _damage(folder: Path) -> str | None:
    """What is wrong with a prepared folder; None: nothing, or there is none."""
    if not folder.is_dir():
        return None
    try:
        sealed = _read_seal(folder)
        digest = sealed.pop("sha256")
        bad = [name for name, sha in sealed["files"].items() if _digest(folder / name) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        return f"{type(exc).__name__}: {exc}"
    if digest != digest_of(sealed):
        bad.append("audit.json")
    return f"{', '.join(bad)} changed" if bad else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
