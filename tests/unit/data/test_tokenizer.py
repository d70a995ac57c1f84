"""A model folder's tokenizer: what it needs, and the shipped one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nexa_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nexa_train.errors import ConfigError, NexaError
from nexa_train.models.locate import TINY_TOKENIZER
from nexa_train.registry import TINY_VOCAB_SIZE


def folder_with(tmp_path: Path, **config: Any) -> Path:
    """The shipped tokenizer with another tokenizer_config.json and without a template file."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(TINY_TOKENIZER / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | config))
    return folder


def test_the_shipped_tokenizer_never_changes(tiny: ChatTokenizer) -> None:
    # Every run of `tiny` is keyed by these files: another digest is another data set and other bits.
    assert tiny.digest == "e7c962af245c432b01dd9d6952ce81e611bf19b80d5c967182c0baa59116b2a1"


def test_the_shipped_tokenizer_has_the_size_that_the_registry_says(tiny: ChatTokenizer) -> None:
    assert tiny.fast.get_vocab_size() == TINY_VOCAB_SIZE


@pytest.mark.parametrize("text", ["", "hello  world\n", "ä 漢字 👩‍👩‍👧 \x00", "2 + 2 = 4"])
def test_any_text_comes_back_from_its_ids(tiny: ChatTokenizer, text: str) -> None:
    assert tiny.fast.decode(tiny.fast.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .*tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_disk_that_fails_is_not_taken_for_a_missing_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, **_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(NexaError, match=r"tokenizer.json cannot be read: Input/output error") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.retryable


@pytest.mark.parametrize("eos", [None, "<nowhere>"])
def test_an_end_token_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path, eos: str | None) -> None:
    with pytest.raises(ConfigError, match="names no eos_token that the tokenizer knows"):
        load_tokenizer(folder_with(tmp_path, eos_token=eos))


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(folder)


def test_a_token_may_be_written_as_an_object(tmp_path: Path) -> None:
    found = load_tokenizer(folder_with(tmp_path, eos_token={"content": "<|im_end|>"}, bos_token="<|endoftext|>"))
    assert (found.eos, found.eos_id, found.bos_id) == ("<|im_end|>", 2, 0)


def posts(folder: Path, **change: Any) -> None:
    """Changes tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_text_begins_with_the_start_token_where_the_tokenizer_puts_it_there_and_not_where_it_only_names_one(
    tmp_path: Path,
) -> None:
    folder = folder_with(tmp_path, bos_token="<|im_start|>")
    assert (load_tokenizer(folder).bos, load_tokenizer(folder).begins) == ("<|im_start|>", "")
    start = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    front = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*front, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": front, "pair": pair, "special_tokens": {start["id"]: start}}
    posts(folder, post_processor=template)
    assert load_tokenizer(folder).begins == "<|im_start|>"


@pytest.mark.parametrize("add", [True, False])
def test_what_the_config_says_of_the_start_token_beside_tokenizer_json_counts_as_little_as_to_transformers(
    tmp_path: Path, add: bool
) -> None:
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, bos_token="<|im_start|>", add_bos_token=add, tokenizer_class="LlamaTokenizer")
    assert AutoTokenizer.from_pretrained(folder)("text").input_ids[0] != 1
    assert load_tokenizer(folder).begins == ""


def test_a_tokenizer_that_knows_a_few_words_alone_puts_nothing_in_front(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, eos_token="</s>", bos_token="<s>")
    words = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "0": 2, "+": 3}, "unk_token": "<unk>"}
    posts(folder, model=words, added_tokens=[], pre_tokenizer={"type": "WhitespaceSplit"}, post_processor=None)
    assert load_tokenizer(folder).begins == ""


def test_an_image_s_token_that_gemma_s_text_model_does_not_embed_is_text_like_any_other(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    posts(folder, added_tokens=[*added, {**added[0], "id": TINY_VOCAB_SIZE, "content": "<image_soft_token>"}])
    assert max(load_tokenizer(folder).fast.get_vocab().values()) == TINY_VOCAB_SIZE
    (folder / "config.json").write_text(json.dumps({"vocab_size": TINY_VOCAB_SIZE, "model_type": "llama"}))
    assert max(load_tokenizer(folder).fast.get_vocab().values()) == TINY_VOCAB_SIZE, "which `check_model` refuses"
    (folder / "config.json").write_text(json.dumps({"vocab_size": TINY_VOCAB_SIZE, "model_type": "gemma3_text"}))
    fast = load_tokenizer(folder).fast
    assert max(fast.get_vocab().values()) == TINY_VOCAB_SIZE - 1
    assert fast.decode(fast.encode("an <image_soft_token>").ids) == "an <image_soft_token>"
    assert fast.encode("<|im_end|>").ids == [2]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
    ],
    ids=["none", "one", "several", "several without default"],
)
def test_the_template_for_chat_is_found_in_the_config(tmp_path: Path, template: Any, expected: str | None) -> None:
    assert load_tokenizer(folder_with(tmp_path, chat_template=template)).template == expected


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="config")
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).template == "file"


def test_another_template_is_another_digest(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    before = load_tokenizer(folder).digest
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).digest != before
