"""Question/answer pairs from the docstrings of the installed Python standard library: real text, no download.

`python -m nexa_train.data.stdlib FILE` writes them as JSONL in the `messages` format, so that machines with
another Python can train on the very same rows.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_CHARS, MAX_CHARS = 40, 240
"""Length of a first paragraph worth learning: shorter ones say little, longer ones make steps slow."""

SKIP_FOLDERS = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")


def docstring_rows() -> list[dict[str, Any]]:
    """One row a documented public class or function, in order of file and line; sources are parsed, not run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(part in SKIP_FOLDERS or part.startswith("_") for part in relative.parts[:-1]):
            rows += _rows_of(path, ".".join(relative.with_suffix("").parts))
    return rows


def _rows_of(path: Path, module: str) -> list[dict[str, Any]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []  # The library ships a few files that are broken on purpose.
    return [_row(kind, name, answer) for kind, name, answer in _documented(tree, module)]


def _documented(tree: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            name = f"{prefix}.{node.name}"
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            answer = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
            if MIN_CHARS <= len(answer) <= MAX_CHARS:
                yield kind, name, answer
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)


def _row(kind: str, name: str, answer: str) -> dict[str, Any]:
    question = f"What does the Python {kind} {name} do?"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in docstring_rows()),
        encoding="utf-8",
    )
