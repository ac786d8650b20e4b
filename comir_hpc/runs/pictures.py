"""Slices of panels.npz as pictures: upright, with square pixels, each volume on a grey scale of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
PLANES = {"axial": "Axial", "coronal": "Coronal", "sagittal": "Sagittal", "slice": "Slice"}
# Index axes (of x, y, z) that run along the rows' and the columns' numbering.
_ROW_AXIS = {"axial": 1, "coronal": 2, "sagittal": 2, "slice": 1}
_COLUMN_AXIS = {"axial": 0, "coronal": 0, "sagittal": 1, "slice": 0}
_Masked = Mapping[tuple[str, str], tuple[Plane, NDArray[np.bool_]]]
_SIDES = (("fixed",), ("before", "after"))  # slices of one volume
_SUFFIXES = ("", "_representation")

# Complementary, so that equal brightness adds up to grey; blue and orange stay apart for the colour-blind.
FIXED_RGB = np.array([0.0, 0.45, 1.0], dtype=np.float32)
MOVING_RGB = 1 - FIXED_RGB

_SPECIMEN_ABOVE = 0.05  # share of the range of intensities above the darkest, which is the background
_ROBUST = (1.0, 99.0)  # percentiles of the specimen's values that become black and white


@dataclass(frozen=True)
class Picture:
    """One picture for an ``<img>``: address, size in pixels, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


def complete_planes(panels: Arrays) -> list[str]:
    """Give the names of the planes that show both volumes; the moving one may be there before alignment only."""
    return [name for name in PLANES if all(f"{name}_{kind}" in panels for kind in ("fixed", "before"))]


def oriented(panels: Arrays, name: str, direction: NDArray[np.float64]) -> dict[str, Plane]:
    """Give the slices of one plane by name, first row on top; NaN where the moving volume has no voxel.

    Parameters
    ----------
    direction : (3, 3)
        ITK direction of the fixed grid: planes are flipped so that head and nose point up and patient left is on the
        right.
    """
    wanted = [f"{kind}{suffix}" for suffix in _SUFFIXES for side in _SIDES for kind in side]
    found = {kind: panels[f"{name}_{kind}"] for kind in wanted if f"{name}_{kind}" in panels}
    return {kind: upright(plane, name, direction) for kind, plane in found.items()}


def upright(plane: NDArray[Any], name: str, direction: NDArray[np.float64]) -> NDArray[Any]:
    """Flip one slice, (rows, columns) or with more axes behind, as `oriented` does."""
    down, right = direction[:, _ROW_AXIS[name]], direction[:, _COLUMN_AXIS[name]]
    # A volume's planes are named by its own axes; a single slice may lie in any plane of the world.
    rows, columns = (
        (int(np.abs(down).argmax()), int(np.abs(right).argmax()))
        if name == "slice"
        else (_ROW_AXIS[name], _COLUMN_AXIS[name])
    )
    # World axes are LPS: y grows to the back, which belongs at the bottom, z to the head, which belongs on top.
    upside_down = (down[rows] > 0) if rows == 2 else (down[rows] < 0)
    mirrored = right[columns] < 0
    return plane[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def shaded(slices: Mapping[str, Mapping[str, Plane]]) -> dict[tuple[str, str], Plane]:
    """Scale slices to 0 to 1, black to white.

    Each volume has one scale for all planes; a point without a voxel is 0.

    Intensities: black and white are percentiles of the volume's values inside the specimen. The share of background
    differs between two volumes, so it does not count.

    Representations: two encoders differ in amplitude and offset, so that on one scale the overlay of two that agree is
    not grey. Each is measured from its own median in units of its own spread inside the specimen; black and white are
    percentiles of both together in these units. Percentiles of each alone would follow its own rare bright values, and
    colour all the rest.

    Parameters
    ----------
    slices : mapping of plane to mapping of kind to (rows, columns)
        Slices of every plane by kind, from `oriented`.

    Returns
    -------
    dict of (plane, kind) to (rows, columns) float32
    """
    shades: dict[tuple[str, str], Plane] = {}
    for side in _SIDES:
        chosen = _chosen(slices, side, "")
        shades |= _between(chosen, *_ends(_values(chosen), chosen))
    learned = [_chosen(slices, side, "_representation") for side in _SIDES]
    units = [_in_own_units(chosen) for chosen in learned if chosen]
    if units:
        ends = _ends(np.concatenate([_values(chosen) for chosen in units]), units[0])
        for chosen in units:
            shades |= _between(chosen, *ends)
    return shades


def _chosen(slices: Mapping[str, Mapping[str, Plane]], side: tuple[str, ...], suffix: str) -> _Masked:
    """Give the slices of one volume, each with where it shows specimen."""
    return {
        (name, kind + suffix): (by_kind[kind + suffix], _specimen_in(by_kind[kind]))
        for name, by_kind in slices.items()
        for kind in side
        if kind in by_kind and kind + suffix in by_kind
    }


def _specimen_in(plane: Plane) -> NDArray[np.bool_]:
    """Say where a slice of intensities shows specimen: a little above its darkest value."""
    known = np.isfinite(plane)
    if not known.any():
        return known
    low, high = plane[known].min(), np.percentile(plane[known], 99.5)
    inside: NDArray[np.bool_] = known & (np.nan_to_num(plane) > low + _SPECIMEN_ABOVE * (high - low))
    return inside


def _values(chosen: _Masked) -> Plane:
    """Give the values inside the specimen, (N,)."""
    inside = [plane[mask & np.isfinite(plane)] for plane, mask in chosen.values()]
    return np.concatenate(inside) if inside else np.zeros(0, dtype=np.float32)


def _in_own_units(chosen: _Masked) -> _Masked:
    values = _values(chosen)
    low, middle, high = np.percentile(values, (10, 50, 90)) if len(values) else (0.0, 0.0, 1.0)
    spread = high - low if high > low else 1.0
    return {
        key: (((plane - middle) / spread).astype(np.float32), mask) for key, (plane, mask) in chosen.items()
    }


def _ends(values: Plane, chosen: _Masked) -> tuple[float, float]:
    """Give the values that become black and white."""
    low, high = np.percentile(values, _ROBUST) if len(values) else (0.0, 0.0)
    if not high > low and chosen:  # nothing varies inside: the background is what it differs from
        known = np.concatenate([plane[np.isfinite(plane)] for plane, _ in chosen.values()])
        low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    return float(low), float(high)


def _between(chosen: _Masked, low: float, high: float) -> dict[tuple[str, str], Plane]:
    width = high - low if high > low else 1.0
    return {
        key: np.nan_to_num(np.clip((plane - low) / width, 0, 1)).astype(np.float32)
        for key, (plane, _) in chosen.items()
    }


def spacing_mm(panels: Arrays, name: str) -> tuple[float, float]:
    """Give the distances (rows, columns) of a plane's pixels in mm; 1 where they are not known."""
    spacing = panels.get(f"{name}_spacing_mm")
    return (1.0, 1.0) if spacing is None else (float(spacing[0]), float(spacing[1]))


def isotropic(plane: Plane, spacing: tuple[float, float], longest: int) -> Plane:
    """Resample to square pixels of the finer spacing, at most `longest` along a side."""
    extent = [n * s for n, s in zip(plane.shape, spacing, strict=True)]
    pixel = max(min(spacing), max(extent) / longest)
    rows, columns = (max(1, round(e / pixel)) for e in extent)
    # Pillow's resize averages when it shrinks, so nothing aliases.
    image = Image.fromarray(np.ascontiguousarray(plane)).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)


def overlay(fixed: Plane, moving: Plane) -> NDArray[np.float32]:
    """Put two greys (rows, columns) in 0 to 1 into one colour picture (rows, columns, 3): grey where they are equal."""
    both: NDArray[np.float32] = fixed[..., None] * FIXED_RGB + moving[..., None] * MOVING_RGB
    return both


def png_uri(values: NDArray[Any]) -> str:
    """Give the data URI of a PNG of (rows, columns) or (rows, columns, 3) values, 0 to 1."""
    pixels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def row_html(pictures: Sequence[NDArray[np.float32]], words: Sequence[str], longest: int) -> str:
    """Give pictures side by side as HTML; small ones are shown larger, up to `longest`, all by the same factor."""
    factor = max(1, longest // max((max(p.shape[:2]) for p in pictures), default=longest))
    style = "display:inline;margin:2px;image-rendering:pixelated"
    return "".join(
        f'<img src="{png_uri(p)}" alt="{text}" title="{text}" width="{p.shape[1] * factor}" style="{style}">'
        for p, text in zip(pictures, words, strict=True)
    )
