"""URI -> rows: what cannot be read is named by file and row."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nexa_train.data.read import Row, read_rows
from nexa_train.errors import ConfigError, DataError, NexaError, NotFoundError
from nexa_train.store import open_store
from tests.unit.data.builders import jsonl


def read(uri: Path | str) -> list[Row]:
    return list(read_rows(str(uri)).rows())


BROKEN: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"a": 1}\n{"a": \n', "train.jsonl row 2: not valid JSON: Expecting value at column"),
    "two objects in a line": (b'{"a": 1} {"a": 2}', "train.jsonl row 1: not valid JSON: Extra data at column 10"),
    "a list": (b'{"a": 1}\n\n[1]', "train.jsonl row 3: expected a JSON object, found list"),
    "a word": (b'"a"', "train.jsonl row 1: expected a JSON object, found str"),
    "null": (b"null", "train.jsonl row 1: expected a JSON object, found NoneType"),
    "not UTF-8": (b'{"a": 1}\n{"a": "\xff"}', "train.jsonl row 2: not UTF-8 text (byte 16)"),
    "a lone surrogate": (
        b'{"a": "\\ud800"}',
        "train.jsonl row 1: holds half a character: a \\ud800 to",
    ),
    "a number without end": (b'{"a": ' + b"1" * 5000 + b"}", "train.jsonl row 1: JSON beyond what can be read"),
    "lists without end": (b"[" * 100_000, "train.jsonl row 1: JSON beyond what can be read"),
    "empty": (b"", "train.jsonl: no rows; a data set needs at least one JSON object a line"),
    "blank lines only": (b"\n  \n\t\n", "train.jsonl: no rows"),
}


@pytest.mark.parametrize(("content", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "train.jsonl")
    assert expected in str(caught.value)


def test_a_file_that_is_not_there_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none.jsonl: no such file or folder; give one with --set"):
        read_rows(str(tmp_path / "none.jsonl"))


def test_the_key_that_names_what_is_not_there_is_the_one_to_set(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        read_rows(str(tmp_path / "none.jsonl"), key="data.validation.uri")
    assert str(caught.value).startswith("data.validation.uri: ")
    assert str(caught.value).endswith("give one with --set data.validation.uri=FILE")


def test_a_mounted_config_map_holds_its_rows_once(tmp_path: Path) -> None:
    dated = tmp_path / "..2026_11_29_10_00_00.123"
    dated.mkdir()
    (dated / "rows.jsonl").write_text('{"a": 1}')
    (tmp_path / "..data").symlink_to(dated.name)
    (tmp_path / "rows.jsonl").symlink_to("..data/rows.jsonl")
    assert [(row.values["a"], row.where) for row in read(tmp_path)] == [(1, "rows.jsonl row 1")]


def test_rows_behind_a_link_to_a_folder_are_read(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "b.jsonl").write_text('{"a": 2}')
    (data := tmp_path / "data").mkdir()
    (data / "a.jsonl").write_text('{"a": 1}')
    (data / "part").symlink_to(elsewhere)
    assert [row.where for row in read(data)] == ["a.jsonl row 1", "part/b.jsonl row 1"]


@pytest.mark.parametrize("target", ["../data", "part"])
def test_links_that_lead_to_a_folder_twice_are_refused(tmp_path: Path, target: str) -> None:
    (part := tmp_path / "data" / "part").mkdir(parents=True)
    (part / "a.jsonl").write_text('{"a": 1}')
    (tmp_path / "data" / "link").symlink_to(target)
    with pytest.raises(DataError, match=r"data\.remote_uri: .* are the same folder, whose rows would be there twice"):
        read(tmp_path / "data")


def test_a_folder_without_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    (tmp_path / "odd.jsonl").mkdir()
    with pytest.raises(NotFoundError, match=r"holds no \*.jsonl file"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("uri", ["ftp://host/a.jsonl", "https://host/a.jsonl", "gs://bucket/a.jsonl"])
def test_a_uri_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"data.remote_uri: {uri} is not supported; use a folder, a .jsonl file or"):
        read_rows(uri)


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}')
    rows = read(tmp_path / "a.jsonl")
    assert [(row.values["a"], row.where) for row in rows] == [(1, "a.jsonl row 2"), (2, "a.jsonl row 4")]


def test_lines_end_at_newlines_only_not_at_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    text = "a\u2028b\x0bc\x85d"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [row.values for row in read(tmp_path / "a.jsonl")] == [{"text": text}]


def test_a_pair_of_surrogate_escapes_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl")[0].values == {"text": "😀"}


def test_a_folder_is_read_in_order_of_names_through_all_its_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "c.jsonl"):
        jsonl(tmp_path / name, {"from": name})
    rows = read(tmp_path)
    assert [row.values["from"] for row in rows] == ["a/z.jsonl", "b.jsonl", "c.jsonl"]
    assert rows[0].where == "a/z.jsonl row 1"


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"a": 1})
    assert read_rows(f"file://{path}").digest == read_rows(str(path)).digest


@pytest.mark.parametrize("host", ["", "localhost"])
def test_a_file_uri_is_read_as_that_of_artifacts_is(tmp_path: Path, host: str) -> None:
    folder = tmp_path / "a b#1?100%"
    rows = jsonl(folder / "a.jsonl", {"a": 1})
    uri = f"file://{host}{folder.as_uri().removeprefix('file://')}"

    assert open_store(uri).uri == str(folder)
    assert read_rows(uri).digest == read_rows(str(folder)).digest
    assert read_rows(f"{uri}/a.jsonl").digest == read_rows(str(rows)).digest


@pytest.mark.parametrize("uri", ["file://elsewhere/data", "file://", "s3://", "s3:///key"])
def test_a_uri_that_lacks_its_place_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.remote_uri: {uri} is not supported; use a folder.* file:///FOLDER"):
        read_rows(uri)


@pytest.mark.parametrize(
    "uri", ["s3://data/gsm8k#v2", "s3://data/gsm8k#v2/train.jsonl", "s3://data/a.jsonl?versionId=1"]
)
def test_what_s3_cannot_name_is_refused_and_not_dropped(uri: str) -> None:
    with pytest.raises(ConfigError, match="takes no fragment and no query"):
        read_rows(uri)


def test_a_copy_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    copies = [jsonl(tmp_path / place / "a.jsonl", {"a": 1}) for place in ("here", "there")]
    assert len({read_rows(str(path.parent)).digest for path in copies}) == 1


def test_another_byte_or_another_name_is_another_digest(tmp_path: Path) -> None:
    rows = {"a": {"a": 1}, "b": {"a": 2}}
    one, other = (jsonl(tmp_path / folder / "a.jsonl", values) for folder, values in rows.items())
    renamed = jsonl(tmp_path / "c" / "b.jsonl", {"a": 1})
    assert len({read_rows(str(path)).digest for path in (one, other, renamed)}) == 3


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    raw = read_rows(str(jsonl(tmp_path / "a.jsonl", {"a": 1}, {"a": 2})))
    assert raw.num_rows == 2
    assert list(raw.rows()) == list(raw.rows())


@pytest.mark.parametrize("later", [({"a": 1},), ({"a": 1}, {"a": 3}), ({"a": 1}, {"a": 2}, {"a": 3})])
def test_rows_that_changed_since_they_were_counted_are_an_error(
    tmp_path: Path, later: tuple[dict[str, int], ...]
) -> None:
    raw = read_rows(str(jsonl(tmp_path / "a.jsonl", {"a": 1}, {"a": 2})))
    jsonl(tmp_path / "a.jsonl", *later)
    with pytest.raises(NexaError, match=r"a.jsonl: changed while it was read; run again") as caught:
        list(raw.rows())
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("number", "retryable"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ETIMEDOUT, True), (errno.EACCES, False)]
)
def test_a_disk_that_fails_is_told_from_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, retryable: bool
) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"a": 1})

    def fail(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(NexaError, match=rf"data.remote_uri: .*a.jsonl cannot be read: {os.strerror(number)}") as caught:
        read_rows(str(file))
    assert caught.value.retryable is retryable


def test_files_of_a_folder_come_in_the_order_in_which_a_store_lists_them(tmp_path: Path) -> None:
    names = ["2024-01/p.jsonl", "2024/p.jsonl", "train.jsonl", "train/x.jsonl"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, {"name": name})
    assert [row.values["name"] for row in read(tmp_path)] == names


def test_a_file_of_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_text('{"text": "here"}\n')
    (tmp_path / "part-2.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(NotFoundError, match=r"part-2.jsonl cannot be read: No such file"):
        read_rows(str(tmp_path))
