"""Ids and targets, against the plain way to find them: every token's offset, one sample at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nexa_train.data.render import Rendered
from nexa_train.data.tokenise import Samples, Spelling, encode, mask
from nexa_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nexa_train.models.locate import TINY_TOKENIZER

TINY = load_tokenizer(TINY_TOKENIZER)


def byte_level() -> Tokenizer:
    return TINY.fast


def composed() -> Tokenizer:
    """As Qwen's: accents are composed, and a token of its own takes the white space around it away."""
    found = Tokenizer.from_str(TINY.fast.to_str())
    found.normalizer = normalizers.NFC()
    found.add_tokens([AddedToken("7", lstrip=True, rstrip=True)])
    return found


def prefixed() -> Tokenizer:
    """A space goes in front of each part of a text, and a token of its own takes the white space behind it away."""
    found = Tokenizer.from_str(TINY.fast.to_str())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found.add_tokens([AddedToken("7", rstrip=True)])
    return found


def trimmed() -> Tokenizer:
    """As GPT-2's: offsets leave white space out, so that some tokens have no width."""
    found = Tokenizer.from_str(TINY.fast.to_str())
    found.post_processor = processors.ByteLevel(trim_offsets=True)
    return found


def pieces() -> Tokenizer:
    """As Llama 2's and Gemma's: white space is rewritten, a mark is put in front, unknown characters become bytes."""
    vocab = [("<unk>", 0.0), ("<|im_end|>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab += [(piece, -float(len(vocab))) for piece in ("\u2581", "a", "b", "\u2581a", "ab", "b\u2581", "\u2581\u2581")]
    found = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    found.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    found.decoder = decoders.ByteFallback()
    return found


def words() -> Tokenizer:
    """As BERT's: accents are taken off, texts are lowered, white space gives no token at all."""
    found = Tokenizer(models.WordLevel({"<unk>": 0, "<|im_end|>": 1, "a": 2, "ab": 3, "e": 4}, unk_token="<unk>"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return found


KINDS = {
    make.__name__: ChatTokenizer(TINY.folder, make(), None, TINY.eos, "a")
    for make in (byte_level, composed, prefixed, trimmed, pieces, words)
}


@dataclass
class Expected:
    ids: list[list[int]]
    targets: list[list[int]]
    counts: dict[str, int]


def plainly(rendered: list[Rendered], tokenizer: ChatTokenizer, limit: int, a_row: int) -> Expected:
    """The rule as it is written down: a token is learnt that begins or ends in a learnt span; the first never is."""
    found = Expected(
        [], [], dict.fromkeys(("rows", "dropped", "truncated", "whole", "without_end", "doubled_start"), 0)
    )
    samples = []
    for each in rendered:
        encoding = tokenizer.fast.encode(each.text, add_special_tokens=False)
        targets = [
            int(any(start < b and (start >= a or end > a) for a, b in each.spans)) for start, end in encoding.offsets
        ]
        samples.append((encoding.ids, [0, *targets[1:]] if targets else []))
    for first in range(0, len(samples), a_row):
        row = samples[first : first + a_row]
        cut = any(len(ids) > limit for ids, _ in row)
        row = [(ids[:limit], targets[:limit]) for ids, targets in row]
        found.counts["rows"] += 1
        if (cut and a_row > 1) or not all(any(targets) for _, targets in row):
            found.counts["dropped"] += 1
            continue
        found.counts["truncated"] += cut
        for ids, targets in row:
            found.ids.append(ids)
            found.targets.append(targets)
            found.counts["whole"] += sum(targets) == len(ids) - 1
            found.counts["without_end"] += not any(
                t for i, t in zip(ids, targets, strict=True) if i == tokenizer.eos_id
            )
            found.counts["doubled_start"] += len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id
    found.counts |= {"samples": len(found.ids), "tokens": sum(map(len, found.ids))}
    return found


@st.composite
def texts(draw: st.DrawFn) -> Rendered:
    """Any text, and spans that may begin and end anywhere in it."""
    parts = st.sampled_from(["a", "b", " ", "\n", "  ", "\u0301", "é", "ﬁ", "漢", "👩‍👩‍👧", "\x00", "<|im_end|>", "7"])
    text = "".join(draw(st.lists(parts | st.text(max_size=3), max_size=12)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return Rendered(text, tuple(zip(cuts[::2], cuts[1::2], strict=False)), "a row")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a_row", [1, 2])
@given(data=st.data())
def test_ids_targets_and_counts_are_those_of_the_rule(kind: str, a_row: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(texts(), min_size=a_row, max_size=a_row), min_size=1, max_size=4))
    limit = data.draw(st.integers(1, 20))
    tokenizer, rendered = KINDS[kind], [each for row in rows for each in row]
    expected = plainly(rendered, tokenizer, limit, a_row)
    [(_, tokenised)] = encode([("x", rendered)], tokenizer)
    found = mask(tokenised, tokenizer, limit=limit, a_row=a_row)
    assert split(found.ids, found) == expected.ids
    assert split(found.targets, found) == expected.targets
    assert {name: found.counts[name] for name in expected.counts} == expected.counts
    assert found.counts["targets"] == sum(map(sum, expected.targets))


def split(values: np.ndarray, found: Samples) -> list[list[int]]:
    return [part.tolist() for part in np.split(values, np.cumsum(found.lengths)[:-1])] if len(found.lengths) else []


def test_chunks_come_back_in_their_order_and_are_taken_only_as_they_are_needed() -> None:
    taken = []

    def chunks() -> Iterator[tuple[int, list[Rendered]]]:
        for number in range(20):
            taken.append(number)
            yield number, [Rendered("a" * number, ((0, number),), "a row")]

    for number, tokenised in encode(chunks(), TINY):
        assert TINY.fast.decode(tokenised.ids.tolist()) == "a" * number
        assert len(taken) <= number + 1 + len(os.sched_getaffinity(0))


def test_the_tokenizers_tested_are_of_different_kinds() -> None:
    kinds = {
        kind: tokenizer.fast.encode(" a  \U0001f600e\u0301 7 b", add_special_tokens=False).offsets
        for kind, tokenizer in KINDS.items()
    }
    assert len({json.dumps(offsets) for offsets in kinds.values()}) == len(KINDS), kinds


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_tokenizers_are_not_asked_for_offsets_unless_these_leave_white_space_out(kind: str) -> None:
    assert (Spelling.of(KINDS[kind]) is not None) == (kind in ("byte_level", "composed"))


def test_tokens_beyond_what_a_vocabulary_with_gaps_counts_are_placed_by_offsets() -> None:
    gaps = Tokenizer(models.BPE({"a": 0, "b": 7, "ab": 9}, [("a", "b")]))
    gaps.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling = Spelling(ChatTokenizer(TINY.folder, gaps, None, TINY.eos, None))
    assert spelling.last == 3
    tokenised = spelling([Rendered("aabb", ((1, 3),), "a row"), Rendered("aa", ((1, 2),), "a row")])
    assert tokenised.ids.tolist() == [0, 9, 7, 0, 0]
    assert sorted(tokenised.spans) == [(1, 2), (4, 5)]


def test_a_tokenizer_that_has_no_token_for_what_it_does_not_know_is_not_asked_what_it_was_not_given() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = ChatTokenizer(TINY.folder, words, None, TINY.eos, None)
    [(_, found)] = encode([("x", [Rendered("a b a", ((2, 5),), "a row")])], tokenizer)
    assert (found.ids.tolist(), found.spans) == ([0, 1, 0], [(1, 3)])
