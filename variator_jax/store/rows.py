"""Lines for people: a title, and below it named rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Rows = Iterable[tuple[str, str]]


def titled(title: str, rows: Rows) -> str:
    """A title and its rows, the texts one below another."""
    return "\n".join(
        [title, *(f"  {name + ':' if name else '':<12} {text}" for name, text in rows)]
    )


def values(values: Mapping[str, Any]) -> str:
    """Named values in one line."""
    shown = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(shown) or "not recorded"


def size_of(size: float) -> str:
    """A number of bytes."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
