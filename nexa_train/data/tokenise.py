"""Rendered texts -> ids and targets, chunk by chunk. Between `render.py` and `prepare.py`."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
from tokenizers import Encoding

from nexa_train.data.render import Rendered
from nexa_train.data.tokenizer import ChatTokenizer

Key = TypeVar("Key")

PROBE = "x a  \U0001f600\u00e9 \u6f22\n\n x7.\t"
"""No white space in front, so that one that a tokenizer puts there shows; and characters of one to four bytes."""
NO_TEXT = b"\xff"
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _SHOWN]
BYTES = {chr(byte): byte for byte in _SHOWN} | {chr(0x100 + place): byte for place, byte in enumerate(_HIDDEN)}
"""The byte that each character of a byte-level token stands for (GPT-2's `bytes_to_unicode`, turned round)."""


@dataclass(frozen=True)
class Samples:
    """Samples one after another, cut at the limit; those dropped are not among them.

    Attributes:
        ids: int32 [tokens]. targets: uint8 [tokens], 1 where the token is learnt. lengths: int64 [samples].
        counts: `audit.SplitAudit` has their meaning.
    """

    ids: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    counts: dict[str, int]


@dataclass(frozen=True)
class Tokenised:
    """Texts' tokens, one text after another.

    Attributes:
        ids: int32 [tokens]. sizes: int64 [texts], tokens of each.
        spans: tokens [first, last) of each learnt span: those that begin inside, and one that only ends there, for
            a space before an answer and its first word may be one token.
    """

    ids: np.ndarray
    sizes: np.ndarray
    spans: list[tuple[int, int]]


def encode(chunks: Iterable[tuple[Key, list[Rendered]]], tokenizer: ChatTokenizer) -> Iterator[tuple[Key, Tokenised]]:
    """Tokenise chunks of texts, several at once while the caller deals with those before; in their order.

    The tokenizer works without the interpreter's lock, so a thread a core is enough. Its own threads stay off: they
    spin while they wait for each other at the end of every chunk, which took as long again as the work.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = len(os.sched_getaffinity(0))
    tokenised = Spelling.of(tokenizer) or partial(by_offsets, tokenizer)
    waiting: deque[tuple[Key, Future[Tokenised]]] = deque()
    with ThreadPoolExecutor(cores) as workers:
        for key, rendered in chunks:
            waiting.append((key, workers.submit(tokenised, rendered)))
            if len(waiting) > cores:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())


def _finished(chunk: tuple[Key, Future[Tokenised]]) -> tuple[Key, Tokenised]:
    return chunk[0], chunk[1].result()


def by_offsets(tokenizer: ChatTokenizer, rendered: list[Rendered]) -> Tokenised:
    """As every tokenizer can: it says itself where in the text its tokens begin."""
    encodings = tokenizer.fast.encode_batch([each.text for each in rendered], add_special_tokens=False)
    ids, sizes = _ids(encodings)
    begins = (np.cumsum(sizes) - sizes).tolist()
    spans = [
        (first + _first_within(encoding, start), first + _token_at(encoding, end))
        for first, text, encoding in zip(begins, rendered, encodings, strict=True)
        for start, end in text.spans
        if start < end
    ]
    return Tokenised(ids, sizes, spans)


def _ids(encodings: list[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [tokens], one text after another, and the tokens of each text, int64 [texts]."""
    sizes = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
    ids = np.fromiter(chain.from_iterable(each.ids for each in encodings), dtype=np.int32, count=int(sizes.sum()))
    return ids, sizes


def _token_at(encoding: Encoding, position: int) -> int:
    """The first token that begins at a character or after it. Tokens stand in the order of the text, so bisection
    finds it, without a Python object for every token."""
    return bisect_left(range(len(encoding)), position, key=lambda token: _characters(encoding, token)[0])


def _first_within(encoding: Encoding, position: int) -> int:
    """The first token that begins at a character, or ends after it; found in the same way."""
    ends_after = bisect_right(range(len(encoding)), position, key=lambda token: _characters(encoding, token)[1])
    return min(ends_after, _token_at(encoding, position))


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    characters = encoding.token_to_chars(token)
    assert characters is not None  # noqa: S101 - only tokens that a post-processor adds have none
    return characters


class Spelling:
    """As byte-level tokenizers can, in two thirds of the time: without offsets.

    Their tokens spell bytes. Where these, one token after another, are the text's own, each begins after those before.
    A text that the tokenizer rewrites (composes, strips) is not spelt so, and is gone through again by its offsets.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.added = {token: each.content for token, each in tokenizer.fast.get_added_tokens_decoder().items()}
        self.last = max([tokenizer.fast.get_vocab_size(with_added_tokens=True), *(token + 1 for token in self.added)])
        """Stands for the tokens from here on, of a vocabulary with gaps."""
        self.bytes = [b""] * self.last + [NO_TEXT]
        self.widths = np.array([0] * self.last + [len(NO_TEXT)], dtype=np.int64)
        """Of each token in bytes; 0: it was not met yet."""

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> Spelling | None:
        """None: this tokenizer's tokens spell something else, or its offsets leave white space out."""
        try:
            tokenizer.fast.encode(PROBE, add_special_tokens=False)
        except Exception:  # noqa: BLE001 - the Rust library's, of one that lacks a token for what it does not know
            return None
        spelling = cls(tokenizer)
        probe = [Rendered(PROBE, ((at, len(PROBE)),), "") for at in range(len(PROBE))]
        found, rewritten = spelling._spelt(probe)
        fits = not rewritten and found.spans == by_offsets(tokenizer, probe).spans
        return spelling if fits else None

    def __call__(self, rendered: list[Rendered]) -> Tokenised:
        """What `by_offsets` gives, the spans in another order."""
        found, rewritten = self._spelt(rendered)
        for index in rewritten:
            first = int(found.sizes[:index].sum())
            spans = by_offsets(self.tokenizer, [rendered[index]]).spans
            found.spans.extend((first + start, first + end) for start, end in spans)
        return found

    def _spelt(self, rendered: list[Rendered]) -> tuple[Tokenised, list[int]]:
        """Without the spans of those texts that were rewritten; and which these are."""
        encodings = self.tokenizer.fast.encode_batch_fast([each.text for each in rendered], add_special_tokens=False)
        ids, sizes = _ids(encodings)
        known = np.minimum(ids, self.last)
        self._meet(known)
        spelt = b"".join(map(self.bytes.__getitem__, known.tolist()))
        begins = np.concatenate([[0], np.cumsum(self.widths[known])])  # of tokens, and the end of all
        borders = begins[np.concatenate([[0], np.cumsum(sizes)])].tolist()  # of texts
        starts: list[int] = []
        ends: list[int] = []
        rewritten = []
        for index, each in enumerate(rendered):
            text, at = each.text.encode(), borders[index]
            spans = [span for span in each.spans if span[0] < span[1]]
            if text != spelt[at : borders[index + 1]]:
                rewritten.append(index)
                continue
            if len(text) != len(each.text):
                spans = [(len(each.text[:start].encode()), len(each.text[:end].encode())) for start, end in spans]
            starts.extend(at + start for start, _ in spans)
            ends.extend(at + end for _, end in spans)
        first, last = np.searchsorted(begins[1:], starts, side="right"), np.searchsorted(begins, ends)
        return Tokenised(ids, sizes, [*zip(first.tolist(), last.tolist(), strict=True)]), rewritten

    def _meet(self, ids: np.ndarray) -> None:
        for token in set(ids[self.widths[ids] == 0].tolist()):
            self.bytes[token] = self._bytes_of(token)
            self.widths[token] = len(self.bytes[token])

    def _bytes_of(self, token: int) -> bytes:
        """What it spells; of one that spells no bytes, a byte that no text has."""
        if token in self.added:
            return self.added[token].encode() or NO_TEXT
        spelt = self.tokenizer.fast.id_to_token(token) or ""
        return bytes(BYTES[char] for char in spelt) if spelt and BYTES.keys() >= set(spelt) else NO_TEXT


def mask(tokenised: Tokenised, tokenizer: ChatTokenizer, *, limit: int, a_row: int) -> Samples:
    """Ids and targets. A token is learnt if it begins or ends inside a learnt span; the first one never is.

    Args:
        limit: tokens that a sample is cut at.
        a_row: samples of each row, kept or dropped together; several (a pair) are never cut.
    """
    ids, sizes = tokenised.ids, tokenised.sizes
    ends = np.cumsum(sizes)
    begins = ends - sizes
    learnt = np.zeros(len(ids), dtype=np.uint8)
    for first, last in tokenised.spans:
        learnt[first:last] = 1
    learnt[begins[sizes > 0]] = 0  # Nothing comes before the first token to predict it from.
    within = np.arange(len(ids)) - np.repeat(begins, sizes) < limit
    learnt[~within] = 0

    targets, cut = _sums(learnt, begins, ends), _any(sizes > limit, a_row)
    good = ~_any(targets == 0, a_row)
    if a_row > 1:
        good &= ~cut
    kept = np.repeat(good, a_row)
    tokens = within & np.repeat(kept, sizes)
    lengths = np.minimum(sizes, limit)[kept]
    ended = _sums(learnt * (ids == tokenizer.eos_id), begins, ends) > 0
    second = begins[kept & (sizes > 1)] + 1
    counts = {
        "rows": len(good),
        "dropped": int((~good).sum()),
        "truncated": int((cut & good).sum()),
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "targets": int(targets[kept].sum()),
        "whole": int((targets[kept] == lengths - 1).sum()),
        "without_end": int((~ended[kept]).sum()),
        "doubled_start": int(((ids[second - 1] == ids[second]) & (ids[second] == tokenizer.bos_id)).sum()),
    }
    return Samples(ids[tokens], learnt[tokens], lengths, counts)


def _sums(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of values[begin:end] for each, int64."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(running[ends] - running[begins])


def _any(samples: np.ndarray, a_row: int) -> np.ndarray:
    """Whether it holds for any sample of a row: bool [rows]."""
    return np.asarray(samples.reshape(-1, a_row).any(axis=1))
