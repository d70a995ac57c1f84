"""Chat templates as they are in the world: TRL ships the published ones, and transformers is the judge."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nexa_train.data.read import Row
from nexa_train.data.render import Rendered, render_rows
from nexa_train.data.tokenizer import BEGIN, ChatTokenizer
from nexa_train.errors import DataError
from tests.unit.data.builders import chat, spec

START = "<|endoftext|>"
trl = find_spec("trl")
TEMPLATES = Path(trl.origin).parent / "chat_templates" if trl and trl.origin else Path("none")

ONE = chat(("user", "Hi."), ("assistant", "Ho."))
TWO = chat(("user", " One? "), ("assistant", "Yes."), ("user", "Two?"), ("assistant", " No.\n"))


def speaking(tiny: ChatTokenizer, name: str) -> ChatTokenizer:
    return ChatTokenizer(tiny.folder, tiny.fast, (TEMPLATES / f"{name}.jinja").read_text(), tiny.eos, START)


def render(values: dict[str, Any], tokenizer: ChatTokenizer, train_on: str = "assistant") -> Rendered:
    job = spec("x", method={"type": "sft", "train_on": train_on})
    [found] = render_rows([Row(values, "a row")], data=job.data, method=job.method, tokenizer=tokenizer)
    return found


def learnt(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


BY_DIFFERENCE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama3": (TWO, ["Yes.<|eot_id|>", "No.<|eot_id|>"]),
    "llama3_1": (TWO, ["Yes.<|eot_id|>", "No.<|eot_id|>"]),
    "qwen2_5": (TWO, ["Yes.<|im_end|>\n", " No.\n<|im_end|>\n"]),
    "gemma": (TWO, ["Yes.<end_of_turn>\n", "No.<end_of_turn>\n"]),
    "cohere": (TWO, ["Yes.<|END_OF_TURN_TOKEN|>", "No.<|END_OF_TURN_TOKEN|>"]),
    # It adds what the model will be given to think of, and takes it from earlier turns.
    "qwen3": (ONE, ["<think>\n\n</think>\n\nHo.<|im_end|>\n"]),
}


@pytest.mark.parametrize("name", BY_DIFFERENCE)
def test_what_the_assistant_says_is_told_apart_by_difference(tiny: ChatTokenizer, name: str) -> None:
    values, expected = BY_DIFFERENCE[name]
    assert learnt(render(values, speaking(tiny, name))) == expected


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
END_ONLY = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_a_template_that_trims_is_followed(tiny: ChatTokenizer) -> None:
    found = render(TWO, ChatTokenizer(tiny.folder, tiny.fast, MISTRAL, tiny.eos, START))
    assert found.text.startswith(f"{START}[INST] One? [/INST] Yes.")
    assert learnt(found) == [" Yes.<|im_end|>", " No.<|im_end|>"]


def test_a_template_that_ends_only_the_whole_is_refused_but_for_its_last_turn(tiny: ChatTokenizer) -> None:
    ending = ChatTokenizer(tiny.folder, tiny.fast, END_ONLY, tiny.eos, None)
    with pytest.raises(DataError, match=r"a row: messages\[1\]: .*rewrites earlier text.*last_turn or all"):
        render(TWO, ending)
    assert learnt(render(TWO, ending, "last_turn")) == [" No.\n\n<|im_end|>"]


def test_a_template_that_takes_thoughts_from_earlier_turns_is_refused_but_for_its_last_turn(
    tiny: ChatTokenizer,
) -> None:
    thinking = chat(
        ("user", "One?"),
        ("assistant", "<think>\nhm\n</think>\n\nYes."),
        ("user", "Two?"),
        ("assistant", "<think>\nwell\n</think>\n\nNo."),
    )
    qwen3 = speaking(tiny, "qwen3")
    with pytest.raises(DataError, match=r"a row: messages\[1\]: the chat template rewrites earlier text"):
        render(thinking, qwen3)
    assert learnt(render(thinking, qwen3, "last_turn")) == ["<think>\nwell\n</think>\n\nNo.<|im_end|>\n"]


def test_a_template_without_a_system_role_says_so(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="a row: the chat template refuses it: System role not supported"):
        render(chat(("system", "Be brief."), ("user", "Hi."), ("assistant", "Ho.")), speaking(tiny, "gemma"))


def test_a_template_that_leaves_the_answer_out_is_refused(tiny: ChatTokenizer) -> None:
    # It knows content in parts only, and writes nothing of a text.
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves out what the user says"):
        render(ONE, speaking(tiny, "smolvlm"))


ROLES_OF_ITS_OWN = (
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASKED = chat(("user", "Weather?"), ("tool", 'It says: "21C"'), ("assistant", "It is sunny."))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_template_that_leaves_out_what_a_tool_said_is_refused(tiny: ChatTokenizer, train_on: str) -> None:
    without_tools = ChatTokenizer(tiny.folder, tiny.fast, ROLES_OF_ITS_OWN, tiny.eos, None)
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template leaves out what the tool says"):
        render(ASKED, without_tools, train_on)


def test_a_template_that_quotes_what_a_tool_said_is_taken(tiny: ChatTokenizer) -> None:
    assert '\\"21C\\"' in render(ASKED, speaking(tiny, "llama3_1")).text


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_a_template_does_not_read_are_refused(tiny: ChatTokenizer, key: str) -> None:
    thoughts = chat(("user", "2+2?"), ("assistant", "4"))
    thoughts["messages"][1][key] = "two and two"
    with pytest.raises(DataError, match=rf"messages\[1\]: the chat template does not read {key}"):
        render(thoughts, speaking(tiny, "llama3"))


def test_a_template_that_wants_to_know_the_day_takes_the_fixed_one_or_is_refused(tiny: ChatTokenizer) -> None:
    assert "Today Date: 26 Jul 2024" in render(ONE, speaking(tiny, "llama3_2")).text
    with pytest.raises(DataError, match="refuses it: 'strftime_now' is undefined"):
        render(ONE, speaking(tiny, "gptoss"))


MARKED = sorted(
    path.stem
    for path in TEMPLATES.glob("*_training.jinja")
    # Those that ask for the day, and those that take content in parts of text and images.
    if "strftime_now" not in path.read_text() and not path.name.startswith(("idefics", "smolvlm", "llava"))
)


def test_there_are_templates_with_marks() -> None:
    assert len(MARKED) > 20


@pytest.mark.parametrize("name", MARKED)
def test_marked_templates_give_the_text_and_the_spans_that_transformers_finds(tiny: ChatTokenizer, name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = speaking(tiny, name)
    found = render(TWO, tokenizer)
    [text], [spans] = render_jinja_template(
        conversations=[TWO["messages"]],
        chat_template=tokenizer.template,
        return_assistant_tokens_mask=True,
        eos_token=tiny.eos,
        bos_token=START,
    )
    assert found.text == text
    assert [tuple(span) for span in spans] == list(found.spans)


def test_the_last_turn_is_told_apart_by_marks(tiny: ChatTokenizer) -> None:
    assert learnt(render(TWO, speaking(tiny, "llama3_training"), "last_turn")) == ["No.<|eot_id|>"]
    found = render(TWO, speaking(tiny, "llama3_training"), "all")
    assert learnt(found) == [found.text]


def test_marks_that_do_not_count_turns_do_not_tell_the_last_one(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="the chat template marks 3 parts for 2 turns of the assistant"):
        render(TWO, speaking(tiny, "phi3_training"), "last_turn")


def test_a_text_that_holds_a_mark_is_refused(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"a row: holds U\+FDD0"):
        render(chat(("user", f"a{BEGIN}b"), ("assistant", "c")), speaking(tiny, "llama3_training"))


TOOLS = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
CALLING = {
    "messages": [
        {"role": "user", "content": "Time?"},
        CALL,
        {"role": "tool", "content": "12:00"},
        *ONE["messages"][1:],
    ],
    "tools": TOOLS,
}


def test_tools_and_their_calls_are_given_to_a_template_that_reads_them(tiny: ChatTokenizer) -> None:
    found = render(CALLING, speaking(tiny, "qwen2_5"))
    assert '"description": "The time."' in found.text
    call, answer = learnt(found)
    assert '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' in call
    assert answer == "Ho.<|im_end|>\n"


def test_what_a_template_would_leave_out_is_refused_by_name(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="a row: column 'tools': the chat template does not read it"):
        render(CALLING, tiny)
    with pytest.raises(DataError, match=r"a row: messages\[1\]: the chat template does not read tool_calls"):
        render({"messages": CALLING["messages"]}, tiny)


def test_tools_of_another_kind_are_named(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="column 'tools' holds str, expected a list of objects"):
        render(CALLING | {"tools": "[]"}, speaking(tiny, "qwen2_5"))


def test_control_tokens_that_the_tokenizer_does_not_know_are_named(tiny: ChatTokenizer) -> None:
    assert tiny.unknown_tokens == []
    assert speaking(tiny, "llama3").unknown_tokens == ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]
