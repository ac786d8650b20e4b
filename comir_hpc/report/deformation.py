"""Pictures and figures of a deformation: where a grid goes, how far, and by how much space is stretched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.report.panels import PlanePictures
from comir_hpc.report.wording import Number, figure
from comir_hpc.runs.deformation import DeformationRecord
from comir_hpc.runs.pictures import PLANES, Arrays, Picture, Plane, png_uri, spacing_mm, upright

_KINDS = ("rows", "columns", "magnitude", "determinant")
_ACROSS = {"axial": "z", "coronal": "y", "sagittal": "x"}
_LONGEST = 320  # pixels of a picture's longer side
_LINES = 16  # lines of the drawn grid along the longer side
_SHRUNK, _GROWN, _FOLDED = (0.1, 0.35, 0.9), (0.9, 0.5, 0.05), (0.85, 0.0, 0.1)


def deformation_pictures(
    panels: Arrays, deformation: Arrays, direction: NDArray[np.float64] | None = None
) -> list[PlanePictures]:
    """Make the pictures of every plane: a grid that is bent, the length of the displacement, and the determinant.

    Parameters
    ----------
    panels : mapping
        Slices of the volumes: the fixed one is drawn under the grid.
    deformation : mapping
        ``{plane}_rows``, ``_columns`` (in voxels), ``_magnitude`` (mm), ``_determinant``, each (rows, columns).
    direction : (3, 3), optional
        ITK direction of the fixed grid, by which planes are turned upright.
    """
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=np.float64)
    names = [name for name in _ACROSS if _complete(name, panels, deformation)]
    most = max((float(deformation[f"{name}_magnitude"].max()) for name in names), default=0.0)
    return [_plane(name, panels, deformation, columns, most) for name in names]


def deformation_numbers(record: DeformationRecord) -> list[Number]:
    """Put the figures of a deformation into words."""
    held, moved, stretched = record.held_out, record.displacement_mm, record.determinant
    numbers = [Number("Smoothness", f"{figure(record.smoothness_mm)} mm", record.kind)]
    if held is not None:
        change = f"{figure(held.before)} → {figure(held.after)}"
        note = f"agreement of {held.cubes} cubes that were held out; gain {figure(held.gain)} ± "
        numbers.append(Number("Held out", change, note + figure(held.standard_error)))
    if record.two_ways is not None:
        ways = record.two_ways
        note = f"mean distance of the bends that maps ({figure(ways.maps_mm)} mm) and intensities "
        note += f"({figure(ways.intensities_mm)} mm) ask for, each by itself"
        numbers.append(Number("Two ways apart", f"{figure(ways.apart_mm)} mm", note))
    if moved:
        most = f"95 % below {figure(moved.get('p95'))}, at most {figure(moved.get('largest'))} mm"
        numbers.append(Number("Displacement", f"{figure(moved.get('mean'))} mm", f"mean; {most}"))
    if stretched:
        span = f"{figure(stretched.get('least'))} to {figure(stretched.get('largest'))}"
        numbers.append(Number("Determinant", span, "1 keeps the size, 0 or less folds"))
        share = f"{figure(100 * record.folded_share)} % of the specimen's points"
        numbers.append(Number("Folds", str(record.folded_points), share))
    if record.inverse_residual_mm:
        back = record.inverse_residual_mm
        note = f"mean of there and back; at most {figure(back.get('largest'))} mm"
        numbers.append(Number("Inverse", f"{figure(back.get('mean'))} mm", note))
    return numbers


def _complete(name: str, panels: Arrays, deformation: Arrays) -> bool:
    fixed = panels.get(f"{name}_fixed")
    planes = [deformation.get(f"{name}_{kind}") for kind in _KINDS]
    return fixed is not None and all(p is not None and p.shape == fixed.shape for p in planes)


def _plane(
    name: str, panels: Arrays, deformation: Arrays, direction: NDArray[np.float64], most_mm: float
) -> PlanePictures:
    spacing = spacing_mm(panels, name)
    fixed = np.asarray(panels[f"{name}_fixed"], dtype=np.float32)
    # The grid's lines are drawn on the pixels of the page, so that they are thin.
    small = {kind: _on_page(deformation[f"{name}_{kind}"], spacing) for kind in _KINDS}
    grey = _on_page(_between(fixed), spacing)
    drawn = {
        "grid": (
            _grid(grey, small, fixed.shape),
            "a regular grid of the moving volume, as it lies on the fixed one",
        ),
        "magnitude": (
            _length(small["magnitude"], most_mm),
            f"length of the displacement, black 0 to white {most_mm:.3g} mm",
        ),
        "determinant": (_stretch(small["determinant"]), "determinant: blue shrinks, orange grows, red folds"),
    }
    pictures: Mapping[str, Picture] = {
        kind: Picture(png_uri(upright(values, name, direction)), values.shape[1], values.shape[0], alt)
        for kind, (values, alt) in drawn.items()
    }
    return PlanePictures(name, PLANES[name], _ACROSS[name], float(fixed.shape[1] * spacing[1]), pictures)


def _on_page(plane: Plane, spacing: tuple[float, float]) -> Plane:
    """Resample to the square pixels of the page; small slices are drawn larger, so that lines stay thin."""
    extent = [n * s for n, s in zip(plane.shape, spacing, strict=True)]
    rows, columns = (max(1, round(_LONGEST * e / max(extent))) for e in extent)
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR), dtype=np.float32)


def _grid(grey: Plane, small: Mapping[str, Plane], shape: tuple[int, ...]) -> NDArray[Any]:
    """Draw the lines of a regular grid at the places that are displaced onto them."""
    every = max(2.0, max(shape) / _LINES)
    picture = np.repeat(0.7 * grey[..., None], 3, axis=2)
    for axis, kind in enumerate(("rows", "columns")):
        pixels = grey.shape[axis]
        place = (np.arange(pixels) + 0.5) * shape[axis] / pixels
        index = small[kind] + (place[:, None] if axis == 0 else place[None])
        away = np.abs(index / every - np.round(index / every)) * every * pixels / shape[axis]
        picture[away < 0.6] = (1.0, 0.8, 0.2)
    return picture


def _length(plane: Plane, most_mm: float) -> NDArray[Any]:
    share = np.clip(plane / most_mm if most_mm > 0 else 0 * plane, 0, 1)[..., None]
    ramp: NDArray[Any] = np.clip(share * 3 - np.arange(3), 0, 1)  # black, red, yellow, white
    return ramp


def _stretch(plane: Plane) -> NDArray[Any]:
    # By powers of two: half the size and twice the size get equally strong colours.
    powers = np.clip(np.log2(np.maximum(plane, 1e-3)), -1, 1)[..., None]
    colour = np.where(powers < 0, _SHRUNK, _GROWN)
    picture: NDArray[Any] = 1 - np.abs(powers) * (1 - colour)
    picture[plane <= 0] = _FOLDED
    return picture


def _between(plane: Plane) -> Plane:
    low, high = np.percentile(plane, (1, 99))
    grey: Plane = np.clip((plane - low) / (high - low if high > low else 1), 0, 1).astype(np.float32)
    return grey
