"""Preferences: a row is a pair of answers to one prompt, kept or dropped as one sequence of two samples."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexa_train.config import JobSpec
from nexa_train.data.prepare import Prepared, prepare
from nexa_train.data.read import Row
from nexa_train.data.render import render_rows
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import DataError
from tests.unit.data.builders import jsonl, spec

PAIR = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five, I think."}


def job(uri: Path | str = "x", **data: Any) -> JobSpec:
    return spec(uri, data={"format": "preference", **data}, method={"type": "dpo"})


def learnt(values: dict[str, Any], tokenizer: ChatTokenizer) -> list[tuple[str, list[str]]]:
    """Of each text of a row: what is not learnt before the first span, and the spans."""
    one = job()
    found = render_rows([Row(values, "train.jsonl row 1")], data=one.data, method=one.method, tokenizer=tokenizer)
    return [(each.text[: each.spans[0][0]], [each.text[a:b] for a, b in each.spans]) for each in found]


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_both_answers_are_learnt_after_the_same_prompt(tiny: ChatTokenizer) -> None:
    (asked, chosen), (asked_again, rejected) = learnt(PAIR, tiny)
    assert asked == asked_again == tiny.render(turns(("user", "Two and two?")), add_generation_prompt=True)
    assert (chosen, rejected) == (["Four.<|im_end|>\n"], ["Five, I think.<|im_end|>\n"])


def test_without_a_template_the_text_is_taken_as_it_is(plain: ChatTokenizer) -> None:
    assert learnt(PAIR, plain) == [
        ("Two and two?", ["Four.<|im_end|>"]),
        ("Two and two?", ["Five, I think.<|im_end|>"]),
    ]


def test_messages_are_taken_too_and_only_the_answers_turns_are_learnt(tiny: ChatTokenizer) -> None:
    said = turns(("user", "Hi"), ("assistant", "Hello."), ("user", "Two and two?"))
    row = {"prompt": said, "chosen": turns(("assistant", "Four.")), "rejected": turns(("assistant", "Five."))}
    (asked, chosen), (asked_again, rejected) = learnt(row, tiny)
    assert asked == asked_again == tiny.render(said, add_generation_prompt=True)
    assert (chosen, rejected) == (["Four.<|im_end|>\n"], ["Five.<|im_end|>\n"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"rejected": None}, "column 'rejected' holds NoneType, expected str"),
    "messages beside text": ({"prompt": turns(("user", "?"))}, "column 'chosen' holds str, expected list"),
    "text beside messages": ({"chosen": turns(("assistant", "!"))}, "column 'chosen' holds list, expected str"),
    "equal answers": ({"chosen": "Same.", "rejected": "Same."}, "chosen and rejected are equal, which prefers nothing"),
    "an empty answer": ({"rejected": ""}, "nothing to learn from: no text of the trained kind (assistant)"),
    "a role of its own": (
        {
            "prompt": turns(("robot", "?")),
            "chosen": turns(("assistant", "a")),
            "rejected": turns(("assistant", "b")),
        },
        "prompt[0]: role 'robot', expected one of system, user",
    ),
}


@pytest.mark.parametrize(("change", "expected"), BAD.values(), ids=BAD)
def test_a_pair_that_teaches_nothing_is_named(tiny: ChatTokenizer, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        learnt({**PAIR, **change}, tiny)
    assert str(caught.value).startswith(f"train.jsonl row 1: {expected}")


def test_a_missing_column_is_named(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"row 1: no column 'chosen' for format preference; the row has: prompt$"):
        learnt({"prompt": "?"}, tiny)


def test_messages_need_a_template(plain: ChatTokenizer) -> None:
    row = {"prompt": turns(("user", "?")), "chosen": turns(("assistant", "a")), "rejected": turns(("assistant", "b"))}
    with pytest.raises(DataError, match="messages need a chat template"):
        learnt(row, plain)


def samples(found: Prepared, split: str = "train") -> list[list[int]]:
    """Ids of every sample, checked to lie two by two in the sequences."""
    ids, starts, bins = (np.load(found.folder / f"{split}.{part}.npy") for part in ("ids", "starts", "bins"))
    assert bins.tolist() == list(range(0, len(starts), 2))
    return [ids[a:b].tolist() for a, b in pairwise(starts)]


def test_a_sequence_is_a_pair_chosen_first(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", PAIR, {**PAIR, "chosen": "4", "rejected": "22"})
    found = prepare(job(rows), tiny)
    texts = [tiny.fast.decode(ids, skip_special_tokens=False) for ids in samples(found)]
    assert [text.partition("assistant\n")[2].partition("<")[0] for text in texts] == [
        "Four.",
        "Five, I think.",
        "4",
        "22",
    ]
    assert found.audit["train"].sequences == found.audit["train"].rows == 2


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_is_dropped_whole_where_one_side_would_be_cut(tmp_path: Path, tiny: ChatTokenizer, side: str) -> None:
    rows = jsonl(tmp_path / "a.jsonl", PAIR, {**PAIR, side: "long " * 200}, PAIR)
    found = prepare(job(rows), tiny)
    audit = found.audit["train"]
    assert (audit.rows, audit.dropped, audit.truncated, audit.sequences) == (3, 1, 0, 2)
    kept = samples(found)
    assert len(kept) == 4
    assert kept[:2] == kept[2:]


def test_pairs_that_are_all_too_long_are_an_error(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", {**PAIR, "rejected": "long " * 200})
    with pytest.raises(DataError, match=r"all 1 train rows are longer than model.max_seq_len 64 on one side; raise it"):
        prepare(job(rows), tiny)


def test_pairs_are_held_out_as_rows_are(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", *({**PAIR, "chosen": f"{n}."} for n in range(10)))
    found = prepare(job(rows, validation={"rows": 3}), tiny)
    assert (len(samples(found)), len(samples(found, "validation"))) == (14, 6)
    assert (found.num_sequences, found.audit["validation"].sequences) == (7, 3)
