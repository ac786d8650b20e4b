"""A registration in a notebook: verdict, reasons, numbers and overlays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comir_hpc.runs.html import table
from comir_hpc.runs.pictures import (
    PLANES,
    complete_planes,
    isotropic,
    oriented,
    overlay,
    row_html,
    shaded,
    spacing_mm,
)
from comir_hpc.runs.result import Result

PANELS_FILE = "panels.npz"
_LONGEST = 220  # pixels of a picture's longer side
_COLOURS = {"PASS": "#0a6b62", "WARN": "#7a4d00", "FAIL": "#9a2412"}


def result_html(folder: Path, result: Result) -> str:
    """Give verdict, reasons, numbers and overlays of a registration as HTML."""
    verdict = result.verdict or "unknown"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in (*result.reasons, *result.notes))
    return (
        f'<div><strong style="color:{_COLOURS.get(verdict, "inherit")}">{verdict}</strong><ul>{reasons}</ul>'
        f"{table('Registration', _numbers(folder, result))}{_overlays(folder, result)}</div>"
    )


def _numbers(folder: Path, result: Result) -> dict[str, str]:
    transform = result.transform
    figures = {"agreement": result.agreement, "margin": result.margin, "overlap": result.overlap}
    rows = {name: f"{value:.3g}" for name, value in figures.items() if value is not None}
    if transform is None:
        rows["transform"] = "none was found"
    else:
        rows["rotation"] = f"{transform.rotation_deg:.2f} degrees"
        rows["translation"] = " ".join(f"{v:.2f}" for v in transform.translation_mm) + " mm (x, y, z; LPS)"
    if result.truth is not None and result.truth.tre_mm is not None:
        rows["error against the truth"] = f"{result.truth.tre_mm:.3g} mm"
    return {**rows, "folder": str(folder)}


def _overlays(folder: Path, result: Result) -> str:
    """Draw fixed in blue and moving in orange, before and after; nothing where panels.npz is missing or damaged."""
    try:
        with np.load(folder / PANELS_FILE, allow_pickle=False) as arrays:
            panels = {key: arrays[key] for key in arrays.files}
        return _rows(panels, _direction(result))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return f"<p>{escape(PANELS_FILE)} cannot be read: there are no pictures.</p>"


def _direction(result: Result) -> NDArray[np.float64]:
    fixed = result.inputs.get("fixed")
    grid = None if fixed is None else fixed.space
    return np.eye(3) if grid is None else np.asarray(grid.direction, dtype=np.float64)


def _rows(panels: Mapping[str, NDArray[np.float32]], direction: NDArray[np.float64]) -> str:
    names = complete_planes(panels)
    shades = shaded({name: oriented(panels, name, direction) for name in names})
    text = ""
    for when in ("before", "after"):
        there = [name for name in names if (name, when) in shades]
        sides = {
            name: [
                isotropic(shades[name, kind], spacing_mm(panels, name), _LONGEST) for kind in ("fixed", when)
            ]
            for name in there
        }
        words = [f"{PLANES[n]}, {when} alignment: fixed blue, moving orange, both grey" for n in there]
        text += row_html([overlay(*sides[name]) for name in there], words, _LONGEST) + "<br>"
    return text
