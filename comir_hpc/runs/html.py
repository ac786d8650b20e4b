"""Results in a notebook: what ``_repr_html_`` of a typed result returns."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Grid
from comir_hpc.runs.pictures import (
    PLANES,
    complete_planes,
    isotropic,
    oriented,
    overlay,
    png_uri,
    shaded,
    spacing_mm,
)
from comir_hpc.runs.result import Result

PANELS_FILE = "panels.npz"
_LONGEST = 220  # pixels of a picture's longer side
_COLOURS = {"PASS": "#0a6b62", "WARN": "#7a4d00", "FAIL": "#9a2412"}


def table(title: str, rows: Mapping[str, object]) -> str:
    """Give an HTML table of two columns under a title, without empty rows; all text is escaped."""
    body = "".join(
        f'<tr><th style="text-align:left">{escape(str(name))}</th>'
        f'<td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
        if value != ""
    )
    return f"<div><strong>{escape(title)}</strong><table>{body}</table></div>"


def volume_html(title: str, rows: Mapping[str, object], path: Path) -> str:
    """Give a table and the middle slices of a volume on disk, from its finest level that is small enough to read.

    Nothing is drawn of a file that is no store, of a store that is not complete, and where no level is small.
    """
    from comir_hpc.volume import Volume

    pictures = ""
    if path.is_dir():
        try:
            volume = Volume.open(path)
            small = [n for n in range(volume.num_levels) if max(volume.level_grid(n).shape_zyx) <= _LONGEST]
            if small:
                pictures = slices_html(volume.read(level=small[0]), volume.level_grid(small[0]))
        except VolumeError as error:
            rows = {**rows, "pictures": f"none: {error}"}
    return table(title, {**rows, "path": path}) + pictures


def slices_html(values: NDArray[Any], grid: Grid) -> str:
    """Give the middle slices of (z, y, x) or (c, z, y, x) values as pictures; of several channels the first."""
    first = values[0] if values.ndim == 4 else values
    panels: dict[str, NDArray[np.float32]] = {}
    for axis, name in enumerate(["slice"] if grid.planar else ["axial", "coronal", "sagittal"]):
        panels[f"{name}_fixed"] = np.take(first, first.shape[axis] // 2, axis=axis).astype(np.float32)
        spacing = [s for other, s in enumerate(grid.spacing_mm) if other != axis]
        panels[f"{name}_spacing_mm"] = np.asarray(spacing, dtype=np.float32)
    direction = np.asarray(grid.direction, dtype=np.float64)
    names = [name for name in PLANES if f"{name}_fixed" in panels]
    shades = shaded({name: oriented(panels, name, direction) for name in names})
    pictures = [isotropic(shades[name, "fixed"], spacing_mm(panels, name), _LONGEST) for name in names]
    words = [f"{PLANES[name]}, middle" for name in names]
    return _row(pictures, words)


def _row(pictures: Sequence[NDArray[np.float32]], words: Sequence[str]) -> str:
    """Give pictures side by side; small ones are shown larger, all by the same factor."""
    factor = max(1, _LONGEST // max((max(p.shape[:2]) for p in pictures), default=_LONGEST))
    style = "display:inline;margin:2px;image-rendering:pixelated"
    return "".join(
        f'<img src="{png_uri(p)}" alt="{text}" title="{text}" width="{p.shape[1] * factor}" style="{style}">'
        for p, text in zip(pictures, words, strict=True)
    )


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
    """Fixed in blue and moving in orange, before and after; nothing where panels.npz is missing or damaged."""
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
        text += _row([overlay(*sides[name]) for name in there], words) + "<br>"
    return text
