"""Row -> text with the spans that are learnt. After `read.py`, before `prepare.py`. Pure but for the template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nexa_train.config.spec import COLUMNS, DataSpec, Method
from nexa_train.data.read import Row
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant", "tool")

TextAndSpans = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Rendered:
    """One text and the character ranges [start, end) whose tokens are targets of the loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str


def render_rows(rows: list[Row], *, data: DataSpec, method: Method, tokenizer: ChatTokenizer) -> Iterator[Rendered]:
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


def check_rows(rows: list[Row], data: DataSpec) -> None:
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
    return found


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise DataError(f"{place}: expected an object with role and content as text")
    if message.get("role") not in ROLES:
        raise DataError(f"{place}: role {message.get('role')!r}, expected one of {', '.join(ROLES)}")


def _render(found: dict[str, Any], form: str, train_on: str, tokenizer: ChatTokenizer) -> list[TextAndSpans]:
    if form == "text":
        return [_plain("", found["text"], "all", tokenizer)]
    if form == "messages":
        return [_chat(found["messages"], train_on, tokenizer)]
    if form == "preference":
        if found["chosen"] == found["rejected"]:
            raise DataError("chosen and rejected are equal, which prefers nothing; take the row out")
        return [_answer(found["prompt"], found[side], train_on, tokenizer) for side in ("chosen", "rejected")]
    prompt, completion = (found[field] for field in COLUMNS[form])
    answered = _answer if form == "question_answer" else _plain
    return [answered(prompt, completion, train_on, tokenizer)]


def _answer(prompt: Any, answer: Any, train_on: str, tokenizer: ChatTokenizer) -> TextAndSpans:
    """Both as text or both as messages; where the model chats, text becomes a turn of the user and one of it."""
    if isinstance(prompt, str):
        if tokenizer.template is None:
            return _plain(prompt, answer, train_on, tokenizer)
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    elif tokenizer.template is None:
        raise DataError(f"messages need a chat template and {tokenizer.folder} has none; give text")
    return _chat([*prompt, *answer], train_on, tokenizer, since=len(prompt))


def _plain(prompt: str, completion: str, train_on: str, tokenizer: ChatTokenizer) -> TextAndSpans:
    if not completion:
        return "", ((0, 0),)
    head = (tokenizer.bos or "") + prompt
    text = head + completion + tokenizer.eos
    return text, ((0 if train_on == "all" else len(head), len(text)),)


def _chat(messages: list[dict[str, Any]], train_on: str, tokenizer: ChatTokenizer, *, since: int = 0) -> TextAndSpans:
    """Spans by prefix difference: what the template adds when the assistant's turn is added, from turn `since` on.

    Works for templates without generation marks; a template whose text for k messages is no prefix of its
    text for k + 1 is refused, never guessed at.
    """
    text = tokenizer.render(messages)
    if train_on == "all":
        return text, ((0, len(text)),)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= since]
    if train_on == "last_turn":
        turns = turns[-1:]
    spans = []
    for turn in turns:
        before = tokenizer.render(messages[:turn], add_generation_prompt=True)
        until = tokenizer.render(messages[: turn + 1])
        if not (until.startswith(before) and text.startswith(until)):
            raise DataError(
                f"messages[{turn}]: the chat template rewrites earlier text when this turn is added, "
                "so what the assistant said cannot be told apart; use method.train_on all, or another template"
            )
        if messages[turn]["content"]:
            spans.append((len(before), len(until)))
    return text, tuple(spans)
