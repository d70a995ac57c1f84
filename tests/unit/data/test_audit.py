"""What a person is told of the rows: every count that is not nothing, and what is likely to be a mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nexa_train.config import JobSpec
from nexa_train.data.audit import SplitAudit, report, warnings
from nexa_train.data.tokenizer import ChatTokenizer
from tests.unit.data.builders import spec

MESSAGES: dict[str, Any] = {"data": {"format": "messages"}}
COUNTED = SplitAudit(rows=12, samples=10, sequences=10, tokens=400, targets=100)


def said(audit: SplitAudit, tokenizer: ChatTokenizer, **groups: Any) -> list[str]:
    return list(warnings({"train": audit}, spec("rows.jsonl", **{**MESSAGES, **groups}), tokenizer))


def reported(audit: SplitAudit, job: JobSpec) -> list[str]:
    return report({"train": audit, "validation": SplitAudit()}, job)


def test_what_happened_is_reported_and_what_did_not_is_not() -> None:
    job = spec("rows.jsonl", **MESSAGES)
    assert reported(COUNTED, job) == ["train data: 12 rows, 10 sequences, 400 tokens, 25.0 % learnt"]
    [line] = reported(replace(COUNTED, dropped=2, truncated=3), job)
    assert line.endswith(f"25.0 % learnt, 3 cut at {job.model.max_seq_len} tokens, 2 dropped as too long")


def test_of_packed_sequences_it_is_said_how_full_they_are() -> None:
    packed = spec("rows.jsonl", data={"format": "messages", "packing": True}, model={"max_seq_len": 50})
    assert reported(COUNTED, packed)[0].endswith("25.0 % learnt, 80.0 % full")


def test_that_a_text_is_learnt_whole_is_said_where_turns_are_asked_for() -> None:
    text = {"data": {"format": "text"}}
    [line] = reported(COUNTED, spec("rows.jsonl", **text))
    assert line.endswith("method.train_on assistant not applied, for text has no turns")
    for method in ({"type": "pretrain"}, {"type": "sft", "train_on": "all"}):
        assert "train_on" not in reported(COUNTED, spec("rows.jsonl", **text, method=method))[0]


def test_evaluations_of_nothing_are_said() -> None:
    job = spec("rows.jsonl", **MESSAGES, training={"eval_every_steps": 5, "max_steps": 10})
    assert reported(COUNTED, job)[1:] == ["validation data: none, so that training.eval_every_steps evaluates nothing"]
    assert len(report({"train": COUNTED, "validation": COUNTED}, job)) == 2


def test_nothing_is_made_of_rows_that_are_as_they_should_be(tiny: ChatTokenizer) -> None:
    assert said(COUNTED, tiny) == said(SplitAudit(), tiny) == []


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"without_end": 10}, "train data: the end token <|im_end|> is learnt in none of 10 samples"),
        ({"doubled_start": 1}, "train data: 1 of 10 samples begin with two start tokens"),
        ({"whole": 10}, "train data: every token of every sample is learnt although method.train_on is assistant"),
    ],
)
def test_what_is_likely_to_be_a_mistake_is_warned_of(tiny: ChatTokenizer, counts: dict[str, int], told: str) -> None:
    [line] = said(replace(COUNTED, **counts), tiny)
    assert line.startswith(told)


def test_some_samples_without_an_end_and_all_learnt_on_request_are_no_mistake(tiny: ChatTokenizer) -> None:
    assert said(replace(COUNTED, without_end=9, whole=9), tiny) == []
    assert said(replace(COUNTED, whole=10), tiny, method={"type": "sft", "train_on": "all"}) == []


def test_control_tokens_that_the_tokenizer_cuts_in_pieces_are_named(tiny: ChatTokenizer) -> None:
    foreign = replace(tiny, template="<|start_header_id|>{{ messages }}<|im_end|>")
    [line] = said(COUNTED, foreign)
    assert line.startswith("the chat template writes <|start_header_id|>, which the tokenizer does not know")
    assert said(COUNTED, foreign, data={"format": "prompt_completion"}) == []
