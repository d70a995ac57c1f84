"""Rows -> one prepared data set on disk: tokenised, masked, packed, memory-mapped. Last stage before the ranks.

The folder is keyed by everything that decides its bytes (rows, tokenizer, template, mask, packing, length,
split), so it is made once and every rank of this machine maps the same pages. Layout, all little-endian:

    train.ids.npy      int32 [tokens]     samples one after another
    train.targets.npy  uint8 [tokens]     1: this token is predicted, and counts in the loss
    train.starts.npy   int64 [samples+1]  where each sample begins
    train.bins.npy     int64 [bins+1]     samples of each sequence (without packing one each; of a preference
                                          two, the chosen and the rejected)
    validation.*       the same
    audit.json         what was counted on the way
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from nexa_train.artifact.manifest import digest_of
from nexa_train.cache import cache_folder, made_whole
from nexa_train.config.spec import JobSpec
from nexa_train.data.cursor import permutation
from nexa_train.data.read import RawData, Row, read_rows
from nexa_train.data.render import Rendered, render_rows
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import DataError

LAYOUT_VERSION = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SplitAudit:
    """What became of the rows of one split.

    Attributes:
        rows: read; dropped: cut so short that nothing was left to learn, or pairs of which one side would be
            cut; truncated: cut, but kept.
        tokens: kept; targets: of those, predicted; sequences: what a step counts (packed: several samples).
        without_end: samples whose end token is not learnt.
        doubled_start: samples that begin with two start tokens.
    """

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    targets: int = 0
    sequences: int = 0
    without_end: int = 0
    doubled_start: int = 0


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: see the module.
        digest: of the rows' bytes. key: of everything that decides the prepared bytes.
    """

    folder: Path
    uri: str
    digest: str
    key: str
    audit: dict[str, SplitAudit]

    @property
    def num_sequences(self) -> int:
        """Sequences to train on, an epoch."""
        return self.audit["train"].sequences


def prepare(spec: JobSpec, tokenizer: ChatTokenizer) -> Prepared:
    """Prepare the job's data, or find it prepared.

    Raises:
        NotFoundError, ConfigError, DataError: see `read_rows` and `render_rows`; DataError also where no
            sample is left to learn from.
    """
    raw = read_rows(spec.data.remote_uri)
    held_out = read_rows(spec.data.validation.uri) if spec.data.validation.uri else None
    digest = raw.digest if held_out is None else digest_of([raw.digest, held_out.digest])
    key = digest_of(_key(spec, tokenizer, digest))
    folder = cache_folder("data") / key[:32]
    if not folder.is_dir():
        rows = dict(zip(SPLITS, split_rows(spec, raw, held_out), strict=True))
        with made_whole(folder) as draft:
            audits = {split: _write(draft, split, rows[split], spec, tokenizer) for split in SPLITS}
            text = json.dumps({split: asdict(audit) for split, audit in audits.items()}, sort_keys=True)
            (draft / "audit.json").write_text(text, encoding="utf-8")
    audit = {k: SplitAudit(**v) for k, v in json.loads((folder / "audit.json").read_text("utf-8")).items()}
    return Prepared(folder, raw.uri, digest, key, audit)


def split_rows(spec: JobSpec, raw: RawData, held_out: RawData | None) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: chosen by the seed, each part in the order of the file.

    Raises:
        DataError: nothing would be left to train on.
    """
    if held_out is not None:
        return raw.rows, held_out.rows
    wanted = spec.data.validation
    total = len(raw.rows)
    count = wanted.rows or (max(1, round(wanted.fraction * total)) if wanted.fraction else 0)
    if count >= total:
        raise DataError(f"{raw.uri}: {total} rows, of which data.validation takes {count}: none is left to train on")
    chosen = set(permutation(total, seed=spec.training.seed, epoch=-1)[:count].tolist())
    train = [row for index, row in enumerate(raw.rows) if index not in chosen]
    return train, [raw.rows[index] for index in sorted(chosen)]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing, deterministic: samples -> bins of at most `capacity` tokens.

    Johnson 1973: at most 11/9 of the fewest bins. Runs in O(samples x log + samples x capacity/64) by
    keeping bins by their free room.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # Bit r set: some bin has exactly r tokens of room.
    bins: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        need = lengths[sample]
        fitting = occupied >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                occupied &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(sample)
        by_room[room - need].append(chosen)
        occupied |= 1 << (room - need)
    return bins


def _key(spec: JobSpec, tokenizer: ChatTokenizer, digest: str) -> dict[str, object]:
    return {
        "layout": LAYOUT_VERSION,
        "rows": digest,
        "tokenizer": tokenizer.digest,
        "data": spec.data.model_dump(mode="json", include={"format", "columns", "packing", "validation"}),
        "method": spec.method.model_dump(mode="json"),
        "max_seq_len": spec.model.max_seq_len,
        "seed": spec.training.seed,
    }


def _write(folder: Path, split: str, rows: list[Row], spec: JobSpec, tokenizer: ChatTokenizer) -> SplitAudit:
    rendered = list(render_rows(rows, data=spec.data, method=spec.method, tokenizer=tokenizer))
    a_row = 2 if spec.data.format == "preference" else 1
    samples, counts = _tokenise(rendered, tokenizer, spec.model.max_seq_len, a_row)
    if rows and not samples:
        uri = (split == "validation" and spec.data.validation.uri) or spec.data.remote_uri
        where = "on one side" if a_row > 1 else "before anything to learn begins"
        raise DataError(
            f"{uri}: all {len(rows)} {split} rows are longer than model.max_seq_len "
            f"{spec.model.max_seq_len} {where}; raise it"
        )
    lengths = [len(ids) for ids, _ in samples]
    each = [list(range(first, first + a_row)) for first in range(0, len(samples), a_row)]
    bins = pack(lengths, spec.model.max_seq_len) if spec.data.packing else each
    order = [index for members in bins for index in members]
    ids = [samples[index][0] for index in order]
    targets = [samples[index][1] for index in order]
    np.save(folder / f"{split}.ids.npy", np.concatenate(ids or [np.empty(0, np.int32)]))
    np.save(folder / f"{split}.targets.npy", np.concatenate(targets or [np.empty(0, np.uint8)]))
    np.save(folder / f"{split}.starts.npy", np.cumsum([0, *(lengths[index] for index in order)], dtype=np.int64))
    np.save(folder / f"{split}.bins.npy", np.cumsum([0, *map(len, bins)], dtype=np.int64))
    num_targets = int(sum(int(mask.sum()) for mask in targets))
    return SplitAudit(rows=len(rows), tokens=sum(lengths), targets=num_targets, sequences=len(bins), **counts)


def _tokenise(
    rendered: list[Rendered], tokenizer: ChatTokenizer, limit: int, a_row: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """Ids and target masks. A token is learnt if it begins inside a learnt span; the first one never is.

    Args:
        a_row: samples of each row, kept or dropped together; several (a pair) are never cut.
    """
    counts = {"dropped": 0, "truncated": 0, "without_end": 0, "doubled_start": 0}
    samples = []
    encoded = tokenizer.fast.encode_batch([each.text for each in rendered], add_special_tokens=False)
    masked = [_masked(each, encoding) for each, encoding in zip(rendered, encoded, strict=True)]
    for first in range(0, len(masked), a_row):
        found = masked[first : first + a_row]
        kept = [(ids[:limit], mask[:limit]) for ids, mask in found]
        cut = any(len(ids) > limit for ids, _ in found)
        if (cut and a_row > 1) or not all(mask.any() for _, mask in kept):
            counts["dropped"] += 1
            continue
        counts["truncated"] += int(cut)
        for ids, mask in kept:
            counts["without_end"] += int(not (mask[ids == tokenizer.eos_id]).any())
            counts["doubled_start"] += int(len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id)
        samples += kept
    return samples, counts


def _masked(rendered: Rendered, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(encoding.ids, dtype=np.int32)
    begins = np.asarray([start for start, _ in encoding.offsets], dtype=np.int64)
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, end in rendered.spans:
        mask[(begins >= start) & (begins < end)] = 1
    mask[:1] = 0  # Nothing comes before the first token to predict it from.
    return ids, mask
