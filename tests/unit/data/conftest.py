from __future__ import annotations

from pathlib import Path

import pytest

from nexa_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nexa_train.models.locate import TINY_TOKENIZER


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny() -> ChatTokenizer:
    """The shipped tokenizer, with a chat template."""
    return load_tokenizer(TINY_TOKENIZER)


@pytest.fixture
def plain(tiny: ChatTokenizer) -> ChatTokenizer:
    """The same without a chat template, as base models have it."""
    return ChatTokenizer(tiny.folder, tiny.fast, None, tiny.eos, tiny.bos)
