"""Rendered texts -> ids and targets, chunk by chunk. Between `render.py` and `prepare.py`."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from tokenizers import Encoding

from nexa_train.data.render import Rendered
from nexa_train.data.tokenizer import ChatTokenizer

Key = TypeVar("Key")


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


def encode(
    chunks: Iterable[tuple[Key, list[Rendered]]], tokenizer: ChatTokenizer
) -> Iterator[tuple[Key, list[Rendered], list[Encoding]]]:
    """Tokenise chunks of texts, several at once while the caller deals with those before; in their order.

    The tokenizer works without the interpreter's lock, so a thread a core is enough. Its own threads stay off: they
    spin while they wait for each other at the end of every chunk, which took as long again as the work.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = len(os.sched_getaffinity(0))
    waiting: deque[tuple[Key, list[Rendered], Future[list[Encoding]]]] = deque()
    with ThreadPoolExecutor(cores) as workers:
        for key, rendered in chunks:
            texts = [each.text for each in rendered]
            future: Future[Any] = workers.submit(tokenizer.fast.encode_batch, texts, add_special_tokens=False)
            waiting.append((key, rendered, future))
            if len(waiting) > cores:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())


def _finished(chunk: tuple[Key, list[Rendered], Future[list[Encoding]]]) -> tuple[Key, list[Rendered], list[Encoding]]:
    return chunk[0], chunk[1], chunk[2].result()


def mask(
    rendered: list[Rendered], encodings: list[Encoding], tokenizer: ChatTokenizer, *, limit: int, a_row: int
) -> Samples:
    """Ids and targets. A token is learnt if it begins inside a learnt span; the first one never is.

    Args:
        limit: tokens that a sample is cut at.
        a_row: samples of each row, kept or dropped together; several (a pair) are never cut.
    """
    sizes = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
    ends = np.cumsum(sizes)
    begins = ends - sizes
    ids = np.fromiter(chain.from_iterable(each.ids for each in encodings), dtype=np.int32, count=int(sizes.sum()))
    learnt = np.zeros(len(ids), dtype=np.uint8)
    for first, text, encoding in zip(begins.tolist(), rendered, encodings, strict=True):
        for start, end in text.spans:
            learnt[first + _token_at(encoding, start) : first + _token_at(encoding, end)] = 1
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


def _token_at(encoding: Encoding, position: int) -> int:
    """The first token that begins at a character or after it. Tokens stand in the order of the text, so bisection
    finds it, without a Python object for every token."""

    def begin(token: int) -> int:
        characters = encoding.token_to_chars(token)
        assert characters is not None  # noqa: S101 - only tokens that a post-processor adds have none
        return characters[0]

    return bisect_left(range(len(encoding)), position, key=begin)


def _sums(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of values[begin:end] for each, int64."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(running[ends] - running[begins])


def _any(samples: np.ndarray, a_row: int) -> np.ndarray:
    """Whether it holds for any sample of a row: bool [rows]."""
    return np.asarray(samples.reshape(-1, a_row).any(axis=1))
