"""Rows -> the prepared data set: what is learnt, what is cut, and that its bytes never vary."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nexa_train.config import JobSpec
from nexa_train.data.prepare import Prepared, held_out_rows, prepare
from nexa_train.data.read import read_rows
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import DataError, NexaError
from tests.unit.data.builders import TURNS, chat, jsonl, numbered, spec


def samples(found: Prepared, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Ids of every sample, and those of them that are learnt."""
    ids, targets, starts = (np.load(found.folder / f"{split}.{part}.npy") for part in ("ids", "targets", "starts"))
    cuts = [(ids[a:b], targets[a:b]) for a, b in pairwise(starts)]
    return [(one.tolist(), one[mask == 1].tolist()) for one, mask in cuts]


def bytes_of(found: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(found.folder.iterdir())}


def decode(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return tokenizer.fast.decode(ids, skip_special_tokens=False)


def test_the_tokens_learnt_are_what_the_assistant_said_and_the_end_of_its_turn(
    tmp_path: Path, tiny: ChatTokenizer
) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(*TURNS, ("user", "Sure?"), ("assistant", "Quite — 漢字.")))
    [(_, learnt)] = samples(prepare(spec(rows), tiny))
    assert decode(tiny, learnt) == "Four, as ever.<|im_end|>\nQuite — 漢字.<|im_end|>\n"


def test_a_completion_is_learnt_with_its_end_token(tmp_path: Path, plain: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"})
    [(ids, learnt)] = samples(prepare(spec(rows, data={"format": "prompt_completion"}), plain))
    assert (decode(plain, ids), decode(plain, learnt)) == ("2 + 2 = 4<|im_end|>", " 4<|im_end|>")


def test_the_first_token_of_a_text_is_never_learnt(tmp_path: Path, plain: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", {"text": "1234"})
    [(ids, learnt)] = samples(prepare(spec(rows, data={"format": "text"}), plain))
    assert learnt == ids[1:]


def test_a_long_sample_is_cut_and_counted_with_its_lost_end(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(), chat(("user", "?"), ("assistant", "long " * 200)))
    found = prepare(spec(rows), tiny)
    audit = found.audit["train"]
    assert (audit.rows, audit.truncated, audit.dropped, audit.without_end) == (2, 1, 0, 1)
    assert max(len(ids) for ids, _ in samples(found)) == 64


def test_a_sample_cut_before_its_answer_is_dropped_and_counted(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(("user", "long " * 200), ("assistant", "yes")), chat())
    audit = prepare(spec(rows), tiny).audit["train"]
    assert (audit.rows, audit.dropped, audit.truncated, audit.sequences) == (2, 1, 0, 1)


def test_two_start_tokens_in_a_row_are_counted(tmp_path: Path, tiny: ChatTokenizer) -> None:
    starting = ChatTokenizer(tiny.folder, tiny.fast, None, tiny.eos, "<|endoftext|>", begins="<|endoftext|>")
    rows = jsonl(tmp_path / "a.jsonl", {"text": "<|endoftext|>once"}, {"text": "twice"})
    assert prepare(spec(rows, data={"format": "text"}), starting).audit["train"].doubled_start == 1


def test_the_audit_counts_what_is_there(tmp_path: Path, tiny: ChatTokenizer) -> None:
    found = prepare(spec(numbered(tmp_path / "a.jsonl", 20), data={"validation": {"rows": 5}}), tiny)
    for split, rows in (("train", 15), ("validation", 5)):
        audit, kept = found.audit[split], samples(found, split)
        assert (audit.rows, audit.sequences) == (rows, rows)
        assert audit.tokens == sum(len(ids) for ids, _ in kept)
        assert audit.targets == sum(len(learnt) for _, learnt in kept)


def test_rows_that_are_all_too_long_are_an_error(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(("user", "long " * 200), ("assistant", "yes")))
    with pytest.raises(DataError, match=r"a.jsonl: all 1 train rows are longer than model.max_seq_len 64"):
        prepare(spec(rows), tiny)


def test_held_out_rows_that_are_all_too_long_are_named_by_their_own_file(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat())
    held_out = jsonl(tmp_path / "v.jsonl", chat(("user", "long " * 200), ("assistant", "yes")))
    with pytest.raises(DataError, match=r"v.jsonl: all 1 validation rows are longer"):
        prepare(spec(rows, data={"validation": {"uri": str(held_out)}}), tiny)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink], ids=["a bit", "the end", "all of it"])
@pytest.mark.parametrize("name", ["train.ids.npy", "validation.targets.npy", "train.bins.npy", "audit.json"])
def test_prepared_data_that_was_damaged_is_said_and_made_anew(
    tmp_path: Path, tiny: ChatTokenizer, name: str, damage: Callable[[Path], None]
) -> None:
    job = spec(numbered(tmp_path / "a.jsonl", 12), data={"validation": {"rows": 3}})
    first = prepare(job, tiny)
    whole = bytes_of(first)
    damage(first.folder / name)
    again = prepare(job, tiny)
    assert bytes_of(again) == whole
    assert again.notes[0].startswith(f"warning: the prepared data in {first.folder} was damaged and is made anew: ")
    assert list(first.folder.parent.iterdir()) == [first.folder]
    assert prepare(job, tiny) == first


@pytest.mark.parametrize("what", ["train", "audit.json"])
def test_counts_that_were_changed_are_damage(tmp_path: Path, tiny: ChatTokenizer, what: str) -> None:
    job = spec(numbered(tmp_path / "a.jsonl", 3))
    seal = prepare(job, tiny).folder / "audit.json"
    seal.write_text(seal.read_text().replace('"sequences": 3', '"sequences": 2') if what == "train" else "[]")
    found = prepare(job, tiny)
    assert (found.num_sequences, len(found.notes)) == (3, 2)


def test_rows_that_change_while_they_are_read_leave_nothing(
    tmp_path: Path, tiny: ChatTokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = numbered(tmp_path / "a.jsonl", 5)
    raw = read_rows(str(rows))
    numbered(rows, 6)
    monkeypatch.setattr("nexa_train.data.prepare.read_splits", lambda _: (raw, None))
    with pytest.raises(NexaError, match="changed while it was read"):
        prepare(spec(rows, data={"validation": {"rows": 1}}), tiny)
    assert list((cache / "data").iterdir()) == []


def test_a_stop_while_data_are_prepared_is_obeyed_at_once_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    rows = numbered(tmp_path / "a.jsonl", 40_000)
    script = f"""
import signal
from nexa_train.data.prepare import prepare
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.models.locate import TINY_TOKENIZER
from tests.unit.data.builders import spec
def stop(*_):
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
prepare(spec({str(rows)!r}), load_tokenizer(TINY_TOKENIZER))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        # Some chunks are through: their tokens wait in the draft.
        while not any(path.stat().st_size for path in cache.glob("data/.*/train.ids.waiting")):
            assert process.poll() is None
            time.sleep(0.01)
        asked = time.monotonic()
        process.terminate()
        assert process.wait(60) == 75
        assert time.monotonic() - asked < 20
    finally:
        process.kill()
    assert list((cache / "data").iterdir()) == []


def test_data_that_failed_leaves_nothing_half_prepared(tmp_path: Path, tiny: ChatTokenizer, cache: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(), chat(("user", "nobody answers")))
    with pytest.raises(DataError, match=r"a.jsonl row 2: nothing to learn from"):
        prepare(spec(rows), tiny)
    assert list((cache / "data").iterdir()) == []


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chars", [1, 500])
def test_the_size_of_chunks_changes_no_byte(
    tmp_path: Path, tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, packing: bool, chars: int
) -> None:
    job = spec(numbered(tmp_path / "a.jsonl", 30), data={"packing": packing, "validation": {"fraction": 0.2}})
    at_once = prepare(job, tiny)
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("nexa_train.data.prepare.CHUNK_CHARS", chars)
    assert bytes_of(prepare(job, tiny)) == bytes_of(at_once)


@pytest.mark.parametrize("packing", [False, True])
def test_the_same_rows_give_the_same_bytes_in_any_cache(
    tmp_path: Path, tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    job = spec(numbered(tmp_path / "a.jsonl", 30), data={"packing": packing, "validation": {"fraction": 0.2}})
    first = prepare(job, tiny)
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "other"))
    second = prepare(job, tiny)
    assert first.folder != second.folder
    assert bytes_of(first) == bytes_of(second)
    assert (first.key, first.audit) == (second.key, second.audit)


def test_prepared_data_is_found_and_not_made_again(tmp_path: Path, tiny: ChatTokenizer) -> None:
    job = spec(numbered(tmp_path / "a.jsonl", 3))
    first = prepare(job, tiny)
    written = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(job, tiny) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == written


def test_what_decides_the_bytes_decides_the_key_and_nothing_else_does(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = numbered(tmp_path / "a.jsonl", 8)

    def key(**groups: object) -> str:
        return prepare(spec(rows, **groups), tiny).key

    keys = [
        key(),
        key(model={"max_seq_len": 32}),
        key(data={"packing": True}),
        key(data={"validation": {"rows": 1}}),
        key(method={"type": "sft", "train_on": "all"}),
        key(training={"seed": 1}),
    ]
    assert len(set(keys)) == len(keys)
    assert key(optimizer={"lr": 1e-3}, training={"max_steps": 3}, cluster={"num_nodes": 2}) == keys[0]


def test_packing_keeps_every_sample_and_saves_sequences(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = numbered(tmp_path / "a.jsonl", 40)
    loose, packed = (prepare(spec(rows, data={"packing": packing}), tiny) for packing in (False, True))
    assert sorted(samples(loose)) == sorted(samples(packed))
    assert packed.num_sequences < loose.num_sequences == 40


def split(job: JobSpec) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on and of those held out."""
    held_out = held_out_rows(job, read_rows(job.data.remote_uri))
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


@pytest.mark.parametrize(
    ("validation", "count"),
    [({}, 0), ({"rows": 7}, 7), ({"fraction": 0.25}, 5), ({"fraction": 0.001}, 1), ({"fraction": 0.9}, 18)],
    ids=["none", "rows", "fraction", "a small fraction is one row", "most"],
)
def test_a_split_holds_out_as_many_rows_as_asked(tmp_path: Path, validation: dict[str, float], count: int) -> None:
    train, held_out = split(spec(numbered(tmp_path / "a.jsonl", 20), data={"validation": validation}))
    assert (len(train), len(held_out)) == (20 - count, count)
    assert sorted([*train, *held_out]) == list(range(20))


def test_a_split_is_the_same_every_time_and_another_for_another_seed(tmp_path: Path) -> None:
    rows = numbered(tmp_path / "a.jsonl", 50)
    once, again, other = (
        split(spec(rows, data={"validation": {"rows": 10}}, training={"seed": seed})) for seed in (0, 0, 1)
    )
    assert once == again
    assert set(once[1]) != set(other[1])


def numbers(found: Prepared, split: str, tokenizer: ChatTokenizer) -> list[int]:
    """The rows that `numbered` wrote, as they stand in a split."""
    texts = (decode(tokenizer, ids) for ids, _ in samples(found, split))
    return [int(text.partition("Row ")[2].partition("?")[0]) for text in texts]


def test_each_part_of_a_split_stays_in_the_order_of_the_file(
    tmp_path: Path, tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexa_train.data.prepare.CHUNK_CHARS", 300)
    job = spec(numbered(tmp_path / "a.jsonl", 30), data={"validation": {"rows": 10}})
    found = prepare(job, tiny)
    assert (numbers(found, "train", tiny), numbers(found, "validation", tiny)) == split(job)
