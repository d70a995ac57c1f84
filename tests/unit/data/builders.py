"""Rows, files and specs with sane contents, for tests that care about one thing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexa_train.config import JobSpec
from nexa_train.data.read import Row

TURNS = (("user", "What is two and two?"), ("assistant", "Four, as ever."))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns or TURNS]}


def row(values: dict[str, Any] | None = None) -> Row:
    return Row(values or chat(), "train.jsonl row 1")


def jsonl(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def numbered(path: Path, count: int) -> Path:
    """Chats of growing length, each one different."""
    return jsonl(path, *(chat(("user", f"Row {n}?"), ("assistant", "yes " * (n % 7) + str(n))) for n in range(count)))


def spec(uri: Path | str, **groups: Any) -> JobSpec:
    data = {"remote_uri": str(uri), **groups.pop("data", {})}
    return JobSpec.model_validate({"data": data, "model": {"max_seq_len": 64}, **groups})
