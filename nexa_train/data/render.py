"""Row -> text with the spans that are learnt. After `read.py`, before `prepare.py`. Pure but for the template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nexa_train.config.spec import COLUMNS, DataSpec, Method
from nexa_train.data.read import Row
from nexa_train.data.tokenizer import BEGIN, END, ChatTokenizer
from nexa_train.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant", "tool")

TextAndSpans = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Rendered:
    """One text and the character ranges [start, end) whose tokens are targets of the loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str


def render_rows(rows: Iterable[Row], *, data: DataSpec, method: Method, tokenizer: ChatTokenizer) -> Iterator[Rendered]:
    """Render every row: one text each; of a preference two, the chosen and then the rejected.

    Raises:
        ConfigError: the format needs a chat template and the model has none.
        DataError: a row lacks a column, has another type, or nothing to learn from; names file and row.
    """
    if data.format == "messages" and tokenizer.template is None:
        raise ConfigError(
            f"data.format messages needs a chat template and {tokenizer.folder} has none; "
            "use prompt_completion or text, or put a chat_template.jinja there"
        )
    train_on = "assistant" if data.format == "preference" else getattr(method, "train_on", "all")
    for row in rows:
        try:
            rendered = _render(check_row(row, data), data.format, train_on, tokenizer)
        except DataError as exc:
            raise DataError(f"{row.where}: {exc}") from exc
        for text, spans in rendered:
            if not any(start < end for start, end in spans):
                raise DataError(f"{row.where}: nothing to learn from: no text of the trained kind ({train_on})")
            yield Rendered(text, spans, row.where)


def check_rows(rows: Iterable[Row], data: DataSpec) -> None:
    """Check every row's columns, without a tokenizer.

    Raises:
        DataError: see `check_row`; names file and row.
    """
    for row in rows:
        try:
            check_row(row, data)
        except DataError as exc:
            raise DataError(f"{row.where}: {exc}") from exc


def check_row(row: Row, data: DataSpec) -> dict[str, Any]:
    """The columns that the format needs, by the names it gives them.

    Raises:
        DataError: a column is missing or holds another type.
    """
    found: dict[str, Any] = {}
    expected = list if data.format == "messages" else str
    for field in COLUMNS[data.format]:
        column = data.columns.get(field, field)
        if column not in row.values:
            have = ", ".join(sorted(map(str, row.values))) or "none"
            raise DataError(f"no column {column!r} for format {data.format}; the row has: {have}")
        found[field] = row.values[column]
        if field == "prompt" and data.format == "preference" and isinstance(found[field], list):
            expected = list  # A prompt of messages has answers of messages.
        if not isinstance(found[field], expected):
            seen = type(found[field]).__name__
            raise DataError(f"column {column!r} holds {seen}, expected {expected.__name__}")
        if expected is list:
            for index, message in enumerate(found[field]):
                _check_message(f"{column}[{index}]", message)
    if expected is list and (tools := row.values.get("tools")):
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise DataError(f"column 'tools' holds {type(tools).__name__}, expected a list of objects")
        found["tools"] = tools
    return found


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{place}: expected an object with role and content as text, found {type(message).__name__}")
    if (role := message.get("role")) not in ROLES:
        raise DataError(f"{place}: role {role!r}, expected one of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise DataError(
            f"{place}: expected an object with role and content as text, found content as {type(content).__name__}"
        )


def _render(found: dict[str, Any], form: str, train_on: str, tokenizer: ChatTokenizer) -> list[TextAndSpans]:
    if form == "text":
        return [_plain("", found["text"], "all", tokenizer)]
    if form == "messages":
        return [_chat(found["messages"], train_on, tokenizer, tools=found.get("tools"))]
    if form == "preference":
        if found["chosen"] == found["rejected"]:
            raise DataError("chosen and rejected are equal, which prefers nothing; take the row out")
        tools = found.get("tools")
        return [_answer(found["prompt"], found[side], train_on, tokenizer, tools) for side in ("chosen", "rejected")]
    prompt, completion = (found[field] for field in COLUMNS[form])
    answered = _answer if form == "question_answer" else _plain
    return [answered(prompt, completion, train_on, tokenizer)]


def _answer(
    prompt: Any, answer: Any, train_on: str, tokenizer: ChatTokenizer, tools: list[dict[str, Any]] | None = None
) -> TextAndSpans:
    """Both as text or both as messages; where the model chats, text becomes a turn of the user and one of it."""
    if isinstance(prompt, str):
        if tokenizer.template is None:
            return _plain(prompt, answer, train_on, tokenizer)
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    elif tokenizer.template is None:
        raise DataError(f"messages need a chat template and {tokenizer.folder} has none; give text")
    return _chat([*prompt, *answer], train_on, tokenizer, since=len(prompt), tools=tools)


def _plain(prompt: str, completion: str, train_on: str, tokenizer: ChatTokenizer) -> TextAndSpans:
    if not completion:
        return "", ((0, 0),)
    head = tokenizer.begins + prompt
    text = head + completion + tokenizer.eos
    return text, ((0 if train_on == "all" else len(head), len(text)),)


def _chat(
    messages: list[dict[str, Any]],
    train_on: str,
    tokenizer: ChatTokenizer,
    *,
    since: int = 0,
    tools: list[dict[str, Any]] | None = None,
) -> TextAndSpans:
    """The conversation and the spans of the assistant's turns, from turn `since` on: as the template marks them,
    else by prefix difference, never by guessing."""
    _check_all_is_read(messages, tools, tokenizer)
    text = tokenizer.render(messages, tools=tools)
    marks: tuple[tuple[int, int], ...] = ()
    if tokenizer.marks_turns:
        text, marks = _marked(text)
    _check_all_is_written(messages, text)
    if train_on == "all":
        return text, ((0, len(text)),)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [index for index in spoken if index >= since]
    if train_on == "last_turn":
        turns = turns[-1:]
    if not tokenizer.marks_turns:
        return text, _differences(messages, turns, text, tokenizer, tools)
    if turns == spoken:
        return text, marks
    if len(marks) != len(spoken):
        raise DataError(
            f"the chat template marks {len(marks)} parts for {len(spoken)} turns of the assistant, so the last turn "
            "cannot be told apart; use method.train_on assistant, or another template"
        )
    return text, marks[len(marks) - len(turns) :]


def _check_all_is_read(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: ChatTokenizer
) -> None:
    """Refuse what the template would leave out of the text without a word."""
    if tools and not tokenizer.reads("tools"):
        raise DataError("column 'tools': the chat template does not read it; take it out, or use another template")
    given = json.dumps([messages, tools], ensure_ascii=False) if tokenizer.marks_turns else ""
    if BEGIN in given or END in given:
        raise DataError("holds U+FDD0 or U+FDD1, which Unicode keeps out of texts; the chat template's marks use them")
    for index, message in enumerate(messages):
        for key in ("tool_calls", "reasoning_content", "thinking"):
            if message.get(key) and not tokenizer.reads(key):
                raise DataError(f"messages[{index}]: the chat template does not read {key}; use another template")


def _check_all_is_written(messages: list[dict[str, Any]], text: str) -> None:
    """Refuse a turn that the template leaves out: an answer to what a tool said would be learnt without that.

    The last word of each stands in the text whatever the template does to thoughts, white space and quotes.
    """
    for index, message in enumerate(messages):
        words = re.findall(r"\w+", last[-1]) if (last := (message.get("content") or "").rsplit(None, 1)) else []
        if words and words[-1] not in text:
            raise DataError(
                f"messages[{index}]: the chat template leaves out what the {message['role']} says; use another template"
            )


def _marked(rendered: str) -> TextAndSpans:
    """Text without marks, and what stood between them."""
    before, *parts = rendered.split(BEGIN)
    text, spans = [before], []
    at = len(before)
    for part in parts:
        inside, *after = part.split(END)
        if len(after) != 1:
            raise DataError("the chat template's marks of what the assistant says stand within each other")
        spans.append((at, at + len(inside)))
        text += [inside, after[0]]
        at += len(inside) + len(after[0])
    return "".join(text), tuple(spans)


def _differences(
    messages: list[dict[str, Any]],
    turns: list[int],
    text: str,
    tokenizer: ChatTokenizer,
    tools: list[dict[str, Any]] | None,
) -> tuple[tuple[int, int], ...]:
    """What the template adds when a turn is added to those before it.

    A template whose text for k messages is no prefix of its text for k + 1 is refused.
    """
    spans = []
    for turn in turns:
        before = tokenizer.render(messages[:turn], add_generation_prompt=True, tools=tools)
        until = text if turn + 1 == len(messages) else tokenizer.render(messages[: turn + 1], tools=tools)
        if not (until.startswith(before) and text.startswith(until)):
            raise DataError(
                f"messages[{turn}]: the chat template rewrites earlier text when this turn is added, so what the "
                "assistant said cannot be told apart; use method.train_on last_turn or all, or another template"
            )
        content = messages[turn].get("content") or ""
        if content or messages[turn].get("tool_calls"):
            spans.append((len(before), len(until)))
        # Its last word stands in its own part of the text, too.
        if (words := content.rsplit(None, 1)) and words[-1] not in until[len(before) :]:
            raise DataError(f"messages[{turn}]: the chat template leaves out what the assistant says")
    return tuple(spans)
