"""Pictures of slices through two volumes: overlays, checkerboards, greys; each a PNG inside a data URI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.runs.pictures import (
    PLANES,
    Arrays,
    Picture,
    Plane,
    complete_planes,
    isotropic,
    oriented,
    overlay,
    png_uri,
    shaded,
    spacing_mm,
)

_ACROSS = {"axial": "z", "coronal": "y", "sagittal": "x", "slice": "z"}

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
_TILES = 8  # squares of the checkerboard along its longer side


@dataclass(frozen=True)
class PlanePictures:
    """All pictures of one plane, by name; the relative width puts the planes on one scale in mm."""

    name: str
    title: str
    across: str
    width_mm: float
    pictures: Mapping[str, Picture]


def plane_pictures(panels: Arrays, direction: NDArray[Any] | None = None) -> list[PlanePictures]:
    """Make pictures of every plane that `panels` holds completely, as sharp as the size of a page allows.

    Parameters
    ----------
    panels : mapping
        ``{plane}_fixed``, ``_before`` and ``_after`` (rows, columns; without ``_after`` where nothing was found),
        optionally the same with ``_representation``, and ``{plane}_spacing_mm`` (row, column distance).
    direction : (3, 3), optional
        ITK direction of the fixed grid: planes are flipped so that head and nose point up and patient left is
        on the right.
    """
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=np.float64)
    names = complete_planes(panels)
    slices = {name: oriented(panels, name, columns) for name in names}
    shades = shaded(slices)
    planes: list[PlanePictures] = []
    for longest in _LONGEST:
        planes = [_plane(name, slices[name], shades, spacing_mm(panels, name), longest) for name in names]
        if sum(len(p.uri) for plane in planes for p in plane.pictures.values()) <= _BYTES:
            break
    return planes


def _plane(
    name: str,
    slices: Mapping[str, Plane],
    shades: Mapping[tuple[str, str], Plane],
    spacing: tuple[float, float],
    longest: int,
) -> PlanePictures:
    greys = {kind: isotropic(shades[name, kind], spacing, longest) for kind in slices}
    return PlanePictures(
        name=name,
        title=PLANES[name],
        across=_ACROSS[name],
        width_mm=float(slices["fixed"].shape[1] * spacing[1]),
        pictures=_pictures(greys, PLANES[name].lower()),
    )


def checkerboard(fixed: Plane, moving: Plane) -> Plane:
    """Join squares of two pictures in turn, eight along the longer side; edges that run on mean alignment."""
    tile = max(1, -(-max(fixed.shape) // _TILES))
    rows, columns = np.indices(fixed.shape) // tile
    return np.where((rows + columns) % 2 == 0, fixed, moving)


def picture_file(path: Path, alt: str) -> Picture | None:
    """Read a picture file and bring it down to the width of the page; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((_PAGE_PIXELS, _PAGE_PIXELS))
    return Picture(png_uri(np.asarray(small, dtype=np.float32) / 255), small.width, small.height, alt)


def _pictures(greys: Mapping[str, Plane], plane: str) -> dict[str, Picture]:
    """Make all pictures of a plane; those of the aligned moving volume only where a registration found an answer."""
    fixed = greys["fixed"]
    shown: dict[str, tuple[NDArray[Any], str]] = {"fixed": (fixed, f"fixed volume, {plane} slice")}
    for when in ("before", "after"):
        if when in greys:
            words, moving = f"{when} alignment, {plane} slice", greys[when]
            shown |= {
                f"moving_{when}": (moving, f"moving volume {words}"),
                f"overlay_{when}": (overlay(fixed, moving), f"overlay {words}"),
                f"checker_{when}": (checkerboard(fixed, moving), f"checkerboard {words}"),
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
