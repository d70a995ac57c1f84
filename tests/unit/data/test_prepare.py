"""Rows -> the prepared data set: what is learnt, what is cut, and that its bytes never vary."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_train.config import JobSpec
from nexa_train.data.prepare import Prepared, pack, prepare, split_rows
from nexa_train.data.read import read_rows
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.errors import DataError
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
    starting = ChatTokenizer(tiny.folder, tiny.fast, None, tiny.eos, "<|endoftext|>")
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


def test_data_that_failed_leaves_nothing_half_prepared(tmp_path: Path, tiny: ChatTokenizer, cache: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", chat(), chat(("user", "nobody answers")))
    with pytest.raises(DataError, match=r"a.jsonl row 2: nothing to learn from"):
        prepare(spec(rows), tiny)
    assert list((cache / "data").iterdir()) == []


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


@given(
    lengths=st.lists(st.integers(1, 64), max_size=80),
    capacity=st.integers(64, 128),
)
def test_packed_bins_hold_every_sample_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(sample for members in bins for sample in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in members) <= capacity for members in bins)
    assert pack(lengths, capacity) == bins


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_packing_needs_at_most_twice_the_bins_that_the_tokens_would_fill(lengths: list[int]) -> None:
    fewest_possible = -(-sum(lengths) // 100)
    large = sum(length > 50 for length in lengths)
    # Any two bins together hold more than one bin takes, or they would be one.
    assert max(fewest_possible, large) <= len(pack(lengths, 100)) <= 2 * fewest_possible


def test_a_perfect_fit_is_found() -> None:
    assert pack([3, 5, 2, 6], 8) == [[3, 2], [1, 0]]


def test_packing_keeps_every_sample_and_saves_sequences(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows = numbered(tmp_path / "a.jsonl", 40)
    loose, packed = (prepare(spec(rows, data={"packing": packing}), tiny) for packing in (False, True))
    assert sorted(samples(loose)) == sorted(samples(packed))
    assert packed.num_sequences < loose.num_sequences == 40


def split(job: JobSpec) -> tuple[list[str], list[str]]:
    train, held_out = split_rows(job, read_rows(job.data.remote_uri), None)
    return [row.where for row in train], [row.where for row in held_out]


@pytest.mark.parametrize(
    ("validation", "count"),
    [({}, 0), ({"rows": 7}, 7), ({"fraction": 0.25}, 5), ({"fraction": 0.001}, 1), ({"fraction": 0.9}, 18)],
    ids=["none", "rows", "fraction", "a small fraction is one row", "most"],
)
def test_a_split_holds_out_as_many_rows_as_asked(tmp_path: Path, validation: dict[str, float], count: int) -> None:
    train, held_out = split(spec(numbered(tmp_path / "a.jsonl", 20), data={"validation": validation}))
    assert (len(train), len(held_out)) == (20 - count, count)
    assert sorted([*train, *held_out]) == sorted(f"a.jsonl row {n}" for n in range(1, 21))


def test_a_split_is_the_same_every_time_and_another_for_another_seed(tmp_path: Path) -> None:
    rows = numbered(tmp_path / "a.jsonl", 50)
    once, again, other = (
        split(spec(rows, data={"validation": {"rows": 10}}, training={"seed": seed})) for seed in (0, 0, 1)
    )
    assert once == again
    assert set(once[1]) != set(other[1])


def test_each_part_of_a_split_stays_in_the_order_of_the_file(tmp_path: Path) -> None:
    for part in split(spec(numbered(tmp_path / "a.jsonl", 30), data={"validation": {"rows": 10}})):
        numbers = [int(where.rpartition(" ")[2]) for where in part]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("validation", [{"rows": 3}, {"rows": 4}, {"fraction": 0.99}], ids=["all", "more", "rounded"])
def test_a_split_that_leaves_nothing_to_train_on_is_an_error(tmp_path: Path, validation: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"a.jsonl: 3 rows, of which data.validation takes \d: none is left"):
        split(spec(numbered(tmp_path / "a.jsonl", 3), data={"validation": validation}))


def test_held_out_rows_may_come_from_a_file_of_their_own(tmp_path: Path, tiny: ChatTokenizer) -> None:
    rows, held_out = numbered(tmp_path / "a.jsonl", 4), numbered(tmp_path / "v.jsonl", 2)
    found = prepare(spec(rows, data={"validation": {"uri": str(held_out)}}), tiny)
    assert {name: audit.rows for name, audit in found.audit.items()} == {"train": 4, "validation": 2}
    assert found.digest != prepare(spec(rows), tiny).digest
