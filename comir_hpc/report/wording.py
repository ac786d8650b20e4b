"""Figures in words, and the small records that the template lays out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Number:
    """One figure of an overview: what, how much, and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing with its title and a sentence under it."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Snippet:
    """Something to copy."""

    title: str
    text: str


def is_number(value: Any) -> bool:
    """Return whether a value from a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figure(value: Any) -> str:
    """Format a number with three significant digits, or a dash where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Format seconds for a person, e.g. ``3 min 12 s``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
