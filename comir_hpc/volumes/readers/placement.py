"""From an affine of any kind to the perpendicular axes of a `Grid`, with a word on what that changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Matrix, Vector

UNSEEN_VOX = 1e-3
"""Displacement in voxels that is rounding: `Grid.agrees_with` sees no difference, and no note is made of it."""

_ROUNDING_VOX = 1e-5  # below it, the file's own origin is kept to the last digit

LARGEST_VOX = 0.5
"""Displacement, in voxels of the smallest side, up to which sheared axes are replaced by perpendicular ones.

No voxel's centre then leaves its own voxel. It is also the most by which resampling to the nearest voxel of a
perpendicular grid moves a value, so the remedy for more shear could not do better without blurring.
"""


@dataclass(frozen=True)
class Placement:
    """Where the voxels lie, in the unit of the affine.

    Attributes
    ----------
    spacing_zyx : three float
        Voxel spacing along z, y, x: the lengths of the affine's columns, in its unit.
    origin_xyz : three float
        World position (x, y, z) of the first voxel's centre in LPS, in the affine's unit.
    direction : 3 x 3 float
        Orthonormal columns for the axes x, y, z, as in `Grid`.
    notes : tuple of str
        Sentences on what the nearest perpendicular axes change, where that can be seen.
    """

    spacing_zyx: Vector
    origin_xyz: Vector
    direction: Matrix
    notes: tuple[str, ...] = ()


def placement(columns: ArrayLike, origin: ArrayLike, shape_zyx: Sequence[int], path: Path) -> Placement:
    """Find the nearest placement with perpendicular axes.

    The directions are those of the closest orthonormal matrix (polar decomposition of the unit columns). Where the
    difference can be seen, the middle of the volume stays where it is, so that the displacement is halved.

    Parameters
    ----------
    columns : (3, 3) array
        Column j is the step in the world (LPS) along index axis j of (x, y, z).
    origin : three float
        World position (x, y, z) of the first voxel's centre in LPS, in the affine's unit.
    shape_zyx : three int
        Voxels of the volume along z, y, x.
    path : Path
        Path of the file, for errors and notes.

    Raises
    ------
    VolumeError
        If a number is not finite, the axes span no volume, or a voxel would move by more than `LARGEST_VOX`.
    """
    columns = _square_to_slices(np.asarray(columns, dtype=np.float64), shape_zyx)
    start = np.asarray(origin, dtype=np.float64)
    _require_axes(columns, start, path)
    lengths = np.linalg.norm(columns, axis=0)
    unit_columns = columns / lengths
    # Of unit columns, not of the columns: large spacings would weigh more than small ones.
    left, _, right = np.linalg.svd(unit_columns)
    direction = left @ right
    middle = (np.asarray(shape_zyx[::-1], dtype=np.float64) - 1) / 2
    # In voxels as `Grid.finest_mm` counts them: of the smallest side along which there is something to see.
    finest = float(min(lengths[middle > 0], default=lengths.min()))
    moved = _largest_displacement(columns, direction * lengths, middle) / finest
    notes: tuple[str, ...] = ()
    if moved > LARGEST_VOX:
        raise VolumeError(
            f"{path}: its axes are sheared by up to {_shear_degrees(unit_columns):.3g} degrees; perpendicular ones "
            f"would move voxels by up to {moved:.3g} voxels (at most {LARGEST_VOX} is taken): resample it on a grid "
            "with perpendicular axes first"
        )
    if moved > _ROUNDING_VOX:
        start = start + (columns - direction * lengths) @ middle
    if moved > UNSEEN_VOX:
        notes = (
            f"{path.name}: its axes are sheared by up to {_shear_degrees(unit_columns):.3g} degrees; the nearest "
            f"perpendicular ones are taken, which moves voxels by up to {moved:.2g} voxels",
        )
    rows = [(float(a), float(b), float(c)) for a, b, c in direction]
    # Plus 0.0 makes a plain zero of a negative one, which would be another text in metadata and fingerprints.
    x, y, z = (float(o) + 0.0 for o in start)
    return Placement(
        (float(lengths[2]), float(lengths[1]), float(lengths[0])),
        (x, y, z),
        (rows[0], rows[1], rows[2]),
        notes,
    )


def _require_axes(columns: NDArray[np.float64], start: NDArray[np.float64], path: Path) -> None:
    """Refuse an affine from which no directions follow."""
    if not (np.isfinite(columns).all() and np.isfinite(start).all()):
        raise VolumeError(
            f"{path}: its orientation holds numbers that are not finite: axes {_rounded(columns)}, origin "
            f"{_rounded(start)} (x, y, z); set it right in the file or export it again"
        )
    lengths = np.linalg.norm(columns, axis=0)
    # Axes that lie in one plane to 1e-3 are not sheared: one of them is missing.
    if abs(np.linalg.det(columns / np.where(lengths > 0, lengths, 1))) < 1e-3:
        raise VolumeError(
            f"{path}: its axes {_rounded(columns)} (columns x, y, z) do not span a volume; set the orientation right "
            "in the file or export it again"
        )


def _square_to_slices(columns: NDArray[np.float64], shape_zyx: Sequence[int]) -> NDArray[np.float64]:
    """Turn the columns so that an axis of one voxel is square to the two others.

    A slice has a thickness, but no third direction of its own.
    """
    single = [axis for axis, size in enumerate(shape_zyx[::-1]) if size == 1]
    if len(single) != 1 or not np.isfinite(columns).all():
        return columns
    axis = single[0]
    normal = np.cross(columns[:, (axis + 1) % 3], columns[:, (axis + 2) % 3])
    long, own = float(np.linalg.norm(normal)), columns[:, axis]
    if long == 0 or normal @ own == 0:
        return columns  # refused by what follows
    square = columns.copy()
    square[:, axis] = np.sign(normal @ own) * np.linalg.norm(own) / long * normal
    return square


def placement_ras(affine: ArrayLike, shape_zyx: Sequence[int], path: Path) -> Placement:
    """Find the placement of an affine (3 x 4 or 4 x 4) of nibabel's: index (x, y, z) to a world right, front, up.

    Raises
    ------
    VolumeError
        For the same reasons as `placement`.
    """
    lps = np.asarray(affine, dtype=np.float64)[:3] * [[-1.0], [-1.0], [1.0]]
    return placement(lps[:, :3], lps[:, 3], shape_zyx, path)


def _largest_displacement(
    columns: NDArray[np.float64], perpendicular: NDArray[np.float64], middle: NDArray[np.float64]
) -> float:
    """Return the distance by which the outermost voxel moves when the middle stays."""
    corners = np.asarray(list(itertools.product(*[(-m, m) for m in middle]))).T
    return float(np.linalg.norm((columns - perpendicular) @ corners, axis=0).max())


def _shear_degrees(unit_columns: NDArray[np.float64]) -> float:
    """Return the largest deviation of two axes from a right angle, in degrees."""
    cosines = np.abs((unit_columns.T @ unit_columns)[np.triu_indices(3, 1)])
    return float(np.degrees(np.arcsin(np.clip(cosines, 0, 1))).max())


def _rounded(values: NDArray[np.float64]) -> list[float]:
    rounded: list[float] = np.round(values, 4).tolist()
    return rounded
