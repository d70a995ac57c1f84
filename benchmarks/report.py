"""Results as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True)
class Target:
    """A ratio that the project promises: what was reached of what, and whether that is enough.

    Attributes:
        at_most: whether small is good.
    """

    what: str
    reached: float
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.reached <= self.target if self.at_most else self.reached >= self.target

    def line(self) -> str:
        """For a terminal."""
        sign = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'MISSED'}  {self.what}: {self.reached:.3g} ({sign} {self.target:g})"


@dataclass(frozen=True)
class Part:
    """One comparison: a row a side, and the targets that it decides."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """As a Markdown table, readable in a terminal as well."""
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [_line(row, widths) for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        decided = [*self.notes, *(target.line() for target in self.targets)]
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"- {line}" for line in decided), ""])

    def document(self) -> dict[str, Any]:
        """For programs."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        return {"title": self.title, "rows": rows, "targets": targets, "notes": list(self.notes)}


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
