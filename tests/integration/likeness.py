"""Whether an object of the API server is the one that was asked for."""

from __future__ import annotations

import math
from typing import Any


def difference(live: Any, wanted: Any, where: str = "") -> str:
    """Where something wanted is not there; the server adds defaults, drops what is empty, and respells quantities."""
    if isinstance(wanted, dict) and wanted:
        parts = ((key, (live or {}).get(key), value) for key, value in wanted.items())
    elif isinstance(wanted, list) and len(live or []) == len(wanted):
        parts = ((str(index), *pair) for index, pair in enumerate(zip(live or [], wanted, strict=True)))
    elif live == wanted or _is_respelt(live, wanted) or (live is None and _is_left_out(wanted, where)):
        return ""
    else:
        return f"{where} is {live!r}, expected {wanted!r}"
    return next(filter(None, (difference(has, wants, f"{where}.{key}") for key, has, wants in parts)), "")


def _is_respelt(live: Any, wanted: Any) -> bool:
    return isinstance(wanted, str) and math.isclose(_amount(live), _amount(wanted))


def _is_left_out(wanted: Any, where: str) -> bool:
    """Whether the server does not write this. It does write a false or 0 without which another default would hold."""
    return wanted == "" or (not wanted and where.rpartition(".")[2] in ("annotations", "readOnly"))


_UNITS = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def _amount(quantity: Any) -> float:
    """In thousandths, as the server rounds them up; it holds no more than 63 bits."""
    text = str(quantity)
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        amount = min(float(text.removesuffix(unit)) * _UNITS.get(unit, 1), 2.0**63)
        return math.ceil(round(amount * 1000, 6))
    except (ValueError, OverflowError):
        return math.nan
