"""Draw each piece of evidence on its scale, with what right and wrong answers of the calibration had behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from comir_hpc.report.wording import figure
from comir_hpc.runs.result import Result
from comir_hpc.runs.result_parts import PieceRecord

_WIDTH, _HEIGHT, _EDGE = 220, 26, 6  # of a drawing, in pixels
_WORDS = {"share": " %", "mm": " mm", "standard deviations": " sd", "correlation": ""}


def evidence_rows(result: Result) -> list[dict[str, Any]]:
    """Make the rows of the table of evidence; none for results from before there was a calibration."""
    return [
        {
            "title": piece.title or piece.name,
            "value": _value(piece),
            "svg": _scale(piece),
            "sentence": piece.sentence,
        }
        for piece in result.evidence
    ]


def _value(piece: PieceRecord) -> str:
    if piece.value is None:
        return "–"
    shown = f"{100 * piece.value:.0f}" if piece.unit == "share" else figure(piece.value)
    return shown + _WORDS.get(piece.unit, f" {piece.unit}")


def _scale(piece: PieceRecord) -> Markup:
    """Draw the scale; empty where nothing is known to compare with."""
    if not (piece.right and piece.wrong) or piece.value is None:
        return Markup("")
    places = [_place(v, piece.unit) for v in (*piece.right, *piece.wrong, piece.value)]
    low, high = min(places), max(places)

    def pixel(value: float) -> float:
        share = (_place(value, piece.unit) - low) / ((high - low) or 1.0)
        return _EDGE + share * (_WIDTH - 2 * _EDGE)

    bars = _bar(piece.right, pixel, 5, "right") + _bar(piece.wrong, pixel, 17, "wrong")
    at = pixel(piece.value)
    label = f"{piece.title or piece.name}: {_value(piece)}"
    return Markup(
        '<svg class="scale" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{bars}'
        '<line class="here" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{h}"/></svg>'
    ).format(w=_WIDTH, h=_HEIGHT, label=label, bars=bars, at=at)


def _bar(values: Sequence[float], pixel: Any, top: float, kind: str) -> Markup:
    """Draw the middle nine tenths thinly and the middle half thickly."""
    ends = [pixel(v) for v in (values[0], values[-1])]
    half = [pixel(v) for v in (values[len(values) // 4], values[-1 - len(values) // 4])]
    return _rectangle(ends, top + 1.5, 1.5, kind) + _rectangle(half, top, 4.5, kind)


def _rectangle(ends: Sequence[float], top: float, height: float, kind: str) -> Markup:
    left, right = sorted(ends)
    return Markup('<rect class="{k}" x="{x:.1f}" y="{y}" width="{w:.1f}" height="{h}"/>').format(
        k=kind, x=left, y=top, w=max(right - left, 1.0), h=height
    )


def _place(value: float, unit: str) -> float:
    """Place a value on its scale: distances and deviations by their logarithm, since they spread over decades."""
    if unit == "mm":
        # A logarithm has no place for 0, and nothing is known below a hundredth of a millimetre.
        return math.log(max(value, 0.01))
    if unit == "standard deviations":
        return math.copysign(math.log1p(abs(value)), value)
    return value
