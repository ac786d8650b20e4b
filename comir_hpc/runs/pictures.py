"""Slices of panels.npz as pictures: upright, with square pixels, each volume on a grey scale of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
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
_SIDES = (("fixed",), ("before", "after"))  # slices of one volume
_SUFFIXES = ("", "_representation")

# Complementary, so that equal brightness adds up to grey; blue and orange stay apart for the colour-blind.
FIXED_RGB = np.array([0.0, 0.45, 1.0], dtype=np.float32)
MOVING_RGB = 1 - FIXED_RGB

_SPECIMEN_ABOVE = 0.05  # of the range of intensities from the darkest, which is the background
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
    steps = (-1 if upside_down else 1, -1 if mirrored else 1)
    return {kind: plane[:: steps[0], :: steps[1]] for kind, plane in found.items()}


def shaded(slices: Mapping[str, Mapping[str, Plane]]) -> dict[tuple[str, str], Plane]:
    """Scale slices to 0 to 1, black to white, each volume on a scale of its own for all planes; 0 without a voxel.

    Two encoders, like two scanners, differ in amplitude and offset: on one common scale the overlay of two
    representations that agree in all but these is not grey. Black and white are percentiles of the values inside the
    specimen, because the share of background differs between two volumes.

    Parameters
    ----------
    slices : mapping of plane to mapping of kind to (rows, columns)
        From `oriented`.

    Returns
    -------
    dict of (plane, kind) to (rows, columns) float32
    """
    shades: dict[tuple[str, str], Plane] = {}
    for side in _SIDES:
        for suffix in _SUFFIXES:
            chosen = {
                (name, kind): (by_kind[kind + suffix], _specimen_in(by_kind[kind]))
                for name, by_kind in slices.items()
                for kind in side
                if kind + suffix in by_kind
            }
            scaled = _scaled(chosen)
            shades |= {(name, kind + suffix): plane for (name, kind), plane in scaled.items()}
    return shades


def _specimen_in(plane: Plane) -> NDArray[np.bool_]:
    """Where a slice of intensities shows specimen: a little above its darkest value."""
    known = np.isfinite(plane)
    if not known.any():
        return known
    low, high = plane[known].min(), np.percentile(plane[known], 99.5)
    inside: NDArray[np.bool_] = known & (np.nan_to_num(plane) > low + _SPECIMEN_ABOVE * (high - low))
    return inside


def _scaled(
    chosen: Mapping[tuple[str, str], tuple[Plane, NDArray[np.bool_]]],
) -> dict[tuple[str, str], Plane]:
    if not chosen:
        return {}
    inside = np.concatenate([plane[mask & np.isfinite(plane)] for plane, mask in chosen.values()])
    low, high = np.percentile(inside, _ROBUST) if len(inside) else (0.0, 0.0)
    if not high > low:  # nothing varies inside: the background is what it differs from
        values = np.concatenate([plane[np.isfinite(plane)] for plane, _ in chosen.values()])
        low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
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
