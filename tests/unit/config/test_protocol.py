"""What a pod says to the operator: small enough for the kubelet, and readable across versions."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from nexa_train.config.protocol import TERMINATION_LOG_BYTES, CheckpointRef, Progress, Termination

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6000)
"""With lone surrogates, as in the names of files that are not UTF-8."""


def last_words(message: str, log: str = "") -> Termination:
    checkpoint = CheckpointRef(step=50, uri="s3://models/" + "p" * 400, digest="ab" * 32, weights_digest="cd" * 32)
    return Termination(
        run_id="team-demo-0123456789",
        attempt=3,
        exit_code=5,
        cause="DataError",
        message=message,
        retryable=False,
        step=57,
        loss=1.25,
        checkpoint=checkpoint,
        log=log,
    )


@given(ANY_TEXT, ANY_TEXT)
@example("\x00" * 6000, "")
@example("\ud800" * 6000, "\x1b" * 2048)
@example("💥" * 6000, "💥" * 2048)
@example('"\\' * 3000, "")
@example("x" * 200_000, "y" * 2048)
def test_last_words_fit_into_the_termination_message_and_keep_every_fact(message: str, log: str) -> None:
    said = last_words(message, log).as_bytes()
    assert len(said) <= TERMINATION_LOG_BYTES
    heard = Termination.model_validate_json(said)
    assert heard == last_words(heard.message, heard.log)


@given(st.text(max_size=300))
def test_a_short_message_arrives_whole(message: str) -> None:
    assert Termination.model_validate_json(last_words(message).as_bytes()).message == message


def test_a_long_message_is_cut_at_its_end_and_fills_the_room() -> None:
    said = last_words("begin " + "x" * 10_000).as_bytes()
    assert Termination.model_validate_json(said).message.startswith("begin xxx")
    assert len(said) > TERMINATION_LOG_BYTES - 16


def test_the_log_is_cut_before_the_message_and_keeps_its_end() -> None:
    said = last_words("m" * 1000, "\x1b" * 3000 + "the end").as_bytes()
    heard = Termination.model_validate_json(said)
    assert heard.message == "m" * 1000
    assert heard.log.endswith("\x1bthe end")
    assert TERMINATION_LOG_BYTES - 16 < len(said) <= TERMINATION_LOG_BYTES


def test_where_the_message_alone_is_too_long_nothing_of_the_log_is_left() -> None:
    heard = Termination.model_validate_json(last_words("m" * 5000, "log" * 600).as_bytes())
    assert (heard.log, heard.message[:2]) == ("", "mm")


def test_a_lone_surrogate_is_said_as_a_question_mark() -> None:
    heard = Termination.model_validate_json(last_words("file a\udcff.jsonl").as_bytes())
    assert heard.message == "file a?.jsonl"


def test_an_older_reader_ignores_what_a_newer_writer_adds() -> None:
    newer = json.dumps({"run_id": "r", "step": 3, "phase": "training", "gpu_temperature": 71})
    assert Progress.model_validate_json(newer) == Progress(run_id="r", step=3, phase="training")


def test_a_newer_reader_fills_in_what_an_older_writer_did_not_say() -> None:
    heard = Termination.model_validate_json(b'{"run_id": "r", "exit_code": 0, "cause": "Succeeded"}')
    assert (heard.attempt, heard.retryable, heard.checkpoint) == (0, True, None)


@given(
    step=st.integers(0, 10**9),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    checkpoint=st.none() | st.builds(CheckpointRef, step=st.integers(0, 10), uri=st.text(), digest=st.just("ab")),
)
def test_progress_arrives_as_it_was_said(step: int, loss: float | None, checkpoint: CheckpointRef | None) -> None:
    said = Progress(run_id="r", step=step, loss=loss, checkpoint=checkpoint)
    assert Progress.model_validate_json(said.model_dump_json()) == said
