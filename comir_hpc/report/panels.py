"""Pictures of slices through two volumes: overlays, checkerboards, greys; each a PNG inside a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.report.contents import Arrays

Plane = NDArray[np.float32]
PLANES = {"axial": "Axial", "coronal": "Coronal", "sagittal": "Sagittal", "slice": "Slice"}
_ACROSS = {"axial": "z", "coronal": "y", "sagittal": "x", "slice": "z"}
# Index axes (of x, y, z) that run along the rows' and the columns' numbering.
_ROW_AXIS = {"axial": 1, "coronal": 2, "sagittal": 2, "slice": 1}
_COLUMN_AXIS = {"axial": 0, "coronal": 0, "sagittal": 1, "slice": 0}

# Complementary, so that equal brightness adds up to grey; blue and orange stay apart for the colour-blind.
FIXED_RGB = np.array([0.0, 0.45, 1.0], dtype=np.float32)
MOVING_RGB = 1 - FIXED_RGB

_LONGEST = (
    400,
    320,
    256,
    200,
    160,
    128,
)  # pixels of the longer side: the first with which all pictures fit in
_BYTES = 2_000_000  # so that a page stays below 3 MB
_PAGE_PIXELS = 900  # longest side of a training picture
_TILES = 8  # of the checkerboard, along the longer side


@dataclass(frozen=True)
class Picture:
    """One picture for an ``<img>``: address, size in pixels, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class PlanePictures:
    """All pictures of one plane, by name; the relative width puts the planes on one scale in mm."""

    name: str
    title: str
    across: str
    width_mm: float
    pictures: Mapping[str, Picture]


def plane_pictures(panels: Arrays, direction: NDArray[Any] | None = None) -> list[PlanePictures]:
    """Pictures of every plane that `panels` holds completely, as sharp as the size of a page allows.

    Parameters
    ----------
    panels : mapping
        ``{plane}_fixed``, ``_before`` and ``_after`` (rows, columns), optionally the same with
        ``_representation``, and ``{plane}_spacing_mm`` (row, column distance).
    direction : (3, 3), optional
        ITK direction of the fixed grid: planes are flipped so that head and nose point up and patient left is
        on the right.
    """
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=np.float64)
    names = [n for n in PLANES if all(f"{n}_{k}" in panels for k in ("fixed", "before", "after"))]
    slices = {name: _oriented(panels, name, columns) for name in names}
    shades = _shades(slices, ("fixed",)) | _shades(slices, ("before", "after"))
    # One scale for both representations: they are meant to be equal.
    shades |= _shades(slices, tuple(f"{k}_representation" for k in ("fixed", "before", "after")))
    planes: list[PlanePictures] = []
    for longest in _LONGEST:
        planes = [_plane(name, slices[name], shades, _spacing(panels, name), longest) for name in names]
        if sum(len(p.uri) for plane in planes for p in plane.pictures.values()) <= _BYTES:
            break
    return planes


def _plane(
    name: str,
    slices: Mapping[str, Plane],
    shades: Mapping[tuple[str, str], Plane],
    spacing_mm: tuple[float, float],
    longest: int,
) -> PlanePictures:
    greys = {kind: _isotropic(shades[name, kind], spacing_mm, longest) for kind in slices}
    return PlanePictures(
        name=name,
        title=PLANES[name],
        across=_ACROSS[name],
        width_mm=float(slices["fixed"].shape[1] * spacing_mm[1]),
        pictures=_pictures(greys, PLANES[name].lower()),
    )


def overlay(fixed: Plane, moving: Plane) -> NDArray[np.float32]:
    """Two greys (rows, columns) in 0 to 1 as one colour picture (rows, columns, 3): grey where they are equal."""
    both: NDArray[np.float32] = fixed[..., None] * FIXED_RGB + moving[..., None] * MOVING_RGB
    return both


def checkerboard(fixed: Plane, moving: Plane) -> Plane:
    """Squares of two pictures in turn, eight along the longer side; edges that run on mean alignment."""
    tile = max(1, -(-max(fixed.shape) // _TILES))
    rows, columns = np.indices(fixed.shape) // tile
    return np.where((rows + columns) % 2 == 0, fixed, moving)


def png_uri(values: NDArray[Any]) -> str:
    """Data URI of a PNG of (rows, columns) or (rows, columns, 3) values, 0 to 1."""
    pixels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture_file(path: Path, alt: str) -> Picture | None:
    """A picture file brought down to the width of the page; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((_PAGE_PIXELS, _PAGE_PIXELS))
    return Picture(png_uri(np.asarray(small, dtype=np.float32) / 255), small.width, small.height, alt)


def _pictures(greys: Mapping[str, Plane], plane: str) -> dict[str, Picture]:
    fixed, before, after = greys["fixed"], greys["before"], greys["after"]
    shown: dict[str, tuple[NDArray[Any], str]] = {
        "fixed": (fixed, f"fixed volume, {plane} slice"),
        "moving_before": (before, f"moving volume before alignment, {plane} slice"),
        "moving_after": (after, f"moving volume after alignment, {plane} slice"),
        "overlay_before": (overlay(fixed, before), f"overlay before alignment, {plane} slice"),
        "overlay_after": (overlay(fixed, after), f"overlay after alignment, {plane} slice"),
        "checker_before": (checkerboard(fixed, before), f"checkerboard before alignment, {plane} slice"),
        "checker_after": (checkerboard(fixed, after), f"checkerboard after alignment, {plane} slice"),
    }
    one, two = greys.get("fixed_representation"), greys.get("after_representation")
    if one is not None and two is not None:
        shown |= {
            "representation_fixed": (one, f"representation of the fixed volume, {plane} slice"),
            "representation_after": (two, f"representation of the moving volume, aligned, {plane} slice"),
            "representation_overlay": (overlay(one, two), f"overlay of the representations, {plane} slice"),
        }
    return {
        name: Picture(png_uri(values), values.shape[1], values.shape[0], alt)
        for name, (values, alt) in shown.items()
    }


def _oriented(panels: Arrays, name: str, direction: NDArray[np.float64]) -> dict[str, Plane]:
    """Slices of one plane by name, first row on top; NaN where the moving volume has no voxel."""
    kinds = ("fixed", "before", "after")
    wanted = [*kinds, *(f"{kind}_representation" for kind in kinds)]
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


def _shades(
    slices: Mapping[str, Mapping[str, Plane]], kinds: tuple[str, ...]
) -> dict[tuple[str, str], Plane]:
    """Slices scaled to 0 to 1 with one window for all planes of the given kinds; 0 where there is no voxel."""
    chosen = {
        (name, kind): by_kind[kind] for name, by_kind in slices.items() for kind in kinds if kind in by_kind
    }
    if not chosen:
        return {}
    values = np.concatenate([plane[np.isfinite(plane)] for plane in chosen.values()])
    low, high = np.percentile(values, (0.5, 99.7)) if len(values) else (0.0, 0.0)
    width = high - low if high > low else 1.0
    return {
        key: np.nan_to_num(np.clip((plane - low) / width, 0, 1)).astype(np.float32)
        for key, plane in chosen.items()
    }


def _spacing(panels: Arrays, name: str) -> tuple[float, float]:
    spacing = panels.get(f"{name}_spacing_mm")
    return (1.0, 1.0) if spacing is None else (float(spacing[0]), float(spacing[1]))


def _isotropic(plane: Plane, spacing_mm: tuple[float, float], longest: int) -> Plane:
    """Resample to square pixels of the finer spacing, at most `longest` along a side."""
    extent = [n * s for n, s in zip(plane.shape, spacing_mm, strict=True)]
    pixel = max(min(spacing_mm), max(extent) / longest)
    rows, columns = (max(1, round(e / pixel)) for e in extent)
    # Pillow's resize averages when it shrinks, so nothing aliases.
    image = Image.fromarray(np.ascontiguousarray(plane)).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)
