"""The commands that the README shows, so that tests run these and no others."""

from __future__ import annotations

import re

from tests.cluster.paths import REPOSITORY


def commands(heading: str) -> list[str]:
    """The lines of the console block below a heading of the README, in order."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.split(rf"^## {re.escape(heading)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", section, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]
