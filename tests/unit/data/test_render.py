"""Row -> text and the spans that are learnt: exactly what the assistant said."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_train.config import JobSpec
from nexa_train.data.read import Row
from nexa_train.data.render import Rendered, check_rows, render_rows
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import ConfigError, DataError
from tests.unit.data.builders import chat, spec


def render(values: dict[str, Any], tokenizer: ChatTokenizer, job: JobSpec) -> Rendered:
    [found] = render_rows([Row(values, "train.jsonl row 1")], data=job.data, method=job.method, tokenizer=tokenizer)
    return found


def learnt(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


def formatted(form: str, **data: Any) -> JobSpec:
    return spec("x", data={"format": form, **data})


def trained_on(part: str) -> JobSpec:
    return spec("x", method={"type": "sft", "train_on": part})


BAD_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"text": "a"}, "messages", "no column 'messages' for format messages; the row has: text"),
    "no columns at all": ({}, "text", "no column 'text' for format text; the row has: none"),
    "messages as text": ({"messages": "hi"}, "messages", "column 'messages' holds str, expected list"),
    "a number as text": ({"text": 3}, "text", "column 'text' holds int, expected str"),
    "null as completion": (
        {"prompt": "a", "completion": None},
        "prompt_completion",
        "column 'completion' holds NoneType, expected str",
    ),
    "half of a pair": ({"question": "a"}, "question_answer", "no column 'answer' for format question_answer; the row"),
    "an unknown role": (chat(("robot", "a")), "messages", "messages[0]: role 'robot', expected one of system, user"),
    "a message without a role": ({"messages": [{"content": "a"}]}, "messages", "messages[0]: role None, expected"),
    "a word for a message": ({"messages": ["a"]}, "messages", "messages[0]: expected an object with role and content"),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages",
        "messages[0]: expected an object with role and content as text",
    ),
}


@pytest.mark.parametrize(("values", "form", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_does_not_fit_its_format_is_named(
    tiny: ChatTokenizer, values: dict[str, Any], form: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        render(values, tiny, formatted(form))
    assert str(caught.value).startswith(f"train.jsonl row 1: {expected}")


@pytest.mark.parametrize(("values", "form", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_is_checked_the_same_without_a_tokenizer(values: dict[str, Any], form: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        check_rows([Row(values, "train.jsonl row 1")], formatted(form).data)
    assert str(caught.value).startswith(f"train.jsonl row 1: {expected}")


NOTHING_LEARNT: dict[str, tuple[dict[str, Any], JobSpec]] = {
    "nobody answers": (chat(("user", "a")), spec("x")),
    "the answer is empty": (chat(("user", "a"), ("assistant", "")), spec("x")),
    "the last answer is empty": (
        chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")),
        trained_on("last_turn"),
    ),
    "no messages": ({"messages": []}, trained_on("all")),
    "an empty text": ({"text": ""}, formatted("text")),
    "an empty completion": ({"prompt": "a", "completion": ""}, formatted("prompt_completion")),
}


@pytest.mark.parametrize(("values", "job"), NOTHING_LEARNT.values(), ids=NOTHING_LEARNT)
def test_a_row_with_nothing_to_learn_is_an_error(tiny: ChatTokenizer, values: dict[str, Any], job: JobSpec) -> None:
    with pytest.raises(DataError, match=r"train.jsonl row 1: nothing to learn from"):
        render(values, tiny, job)


def test_only_what_the_assistant_says_is_learnt(tiny: ChatTokenizer) -> None:
    found = render(chat(("user", "2+2?"), ("assistant", "Four.")), tiny, spec("x"))
    assert found.text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
    assert learnt(found) == ["Four.<|im_end|>\n"]


CONVERSATION = chat(
    ("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")
)


def test_every_turn_of_the_assistant_is_learnt(tiny: ChatTokenizer) -> None:
    assert learnt(render(CONVERSATION, tiny, spec("x"))) == ["Yes.<|im_end|>\n", "No.<|im_end|>\n"]


def test_only_the_last_turn_is_learnt_where_asked(tiny: ChatTokenizer) -> None:
    assert learnt(render(CONVERSATION, tiny, trained_on("last_turn"))) == ["No.<|im_end|>\n"]


def test_everything_is_learnt_where_asked(tiny: ChatTokenizer) -> None:
    found = render(CONVERSATION, tiny, trained_on("all"))
    assert learnt(found) == [found.text]


def test_an_empty_turn_between_others_is_not_learnt(tiny: ChatTokenizer) -> None:
    turns = chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))
    assert learnt(render(turns, tiny, spec("x"))) == ["c<|im_end|>\n"]


def test_a_tool_answers_and_is_not_learnt(tiny: ChatTokenizer) -> None:
    turns = chat(("user", "time?"), ("tool", "12:00"), ("assistant", "Noon."))
    assert learnt(render(turns, tiny, spec("x"))) == ["Noon.<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_text_is_refused(tiny: ChatTokenizer) -> None:
    # As templates do that drop the thoughts of earlier turns.
    template = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rewriting = ChatTokenizer(tiny.folder, tiny.fast, template, tiny.eos, tiny.bos)
    with pytest.raises(DataError, match=r"row 1: messages\[1\]: the chat template rewrites earlier text"):
        render(chat(), rewriting, spec("x"))
    assert learnt(render(chat(("user", "a"), ("assistant", "b")), rewriting, trained_on("all"))) == [
        "2[user]a[assistant]b"
    ]


def test_what_a_template_refuses_is_said_in_its_own_words(tiny: ChatTokenizer) -> None:
    refusing = ChatTokenizer(tiny.folder, tiny.fast, "{{ raise_exception('no tools here') }}", tiny.eos, tiny.bos)
    with pytest.raises(DataError, match="row 1: the chat template refuses it: no tools here"):
        render(chat(), refusing, spec("x"))


def test_a_template_cannot_reach_python(tiny: ChatTokenizer) -> None:
    reaching = ChatTokenizer(tiny.folder, tiny.fast, "{{ ''.__class__.__mro__[1].__subclasses__() }}", tiny.eos, None)
    with pytest.raises(DataError, match=r"the chat template refuses it: .*unsafe"):
        render(chat(), reaching, trained_on("all"))


def test_messages_need_a_chat_template(plain: ChatTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"needs a chat template and .* has none; use prompt_completion or text"):
        render(chat(), plain, spec("x"))


@pytest.mark.parametrize("form", ["prompt_completion", "question_answer"])
def test_without_a_template_the_completion_follows_the_prompt(plain: ChatTokenizer, form: str) -> None:
    values = {"prompt": "2+2=", "completion": "4", "question": "2+2=", "answer": "4"}
    found = render(values, plain, formatted(form))
    assert (found.text, learnt(found)) == ("2+2=4<|im_end|>", ["4<|im_end|>"])


def test_questions_are_asked_in_the_chat_template_where_there_is_one(tiny: ChatTokenizer) -> None:
    found = render({"question": "2+2?", "answer": "4"}, tiny, formatted("question_answer"))
    assert found == render(chat(("user", "2+2?"), ("assistant", "4")), tiny, spec("x"))


def test_a_text_begins_with_the_start_token_and_ends_with_the_end_token(tiny: ChatTokenizer) -> None:
    starting = ChatTokenizer(tiny.folder, tiny.fast, None, tiny.eos, "<|endoftext|>", begins="<|endoftext|>")
    found = render({"text": "once"}, starting, formatted("text"))
    assert (found.text, learnt(found)) == ("<|endoftext|>once<|im_end|>", [found.text])


def test_columns_of_another_name_are_mapped(plain: ChatTokenizer) -> None:
    job = formatted("prompt_completion", columns={"prompt": "in", "completion": "out"})
    assert render({"in": "a", "out": "b"}, plain, job).text == "ab<|im_end|>"


def test_a_mapped_column_that_is_missing_is_named_as_mapped(plain: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="no column 'body' for format text; the row has: text"):
        render({"text": "a"}, plain, formatted("text", columns={"text": "body"}))
