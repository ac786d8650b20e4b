"""Make slices for the report through the middle of the specimen: fixed, and moving before and after."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.protocol import PointMap

# Array axis (z, y, x) that a plane cuts across.
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
SLICE = {"slice": 0}
"""The only plane of a single slice."""


def make_panels(
    fixed: Features,
    moving: Features,
    before: PointMap,
    after: PointMap,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    representation: bool,
) -> dict[str, NDArray[np.float32]]:
    """Make three slices on the fixed grid through its mask's centre of mass; for a single slice it is that slice.

    Parameters
    ----------
    fixed, moving : Features
        Features of the two volumes.
    before, after : PointMap
        Transforms from fixed to moving points. The moving volume is shown under both.
    images : two of (z, y, x)
        Intensities of the fixed and the moving volume, on the grids of the features.
    representation : bool
        Whether the features' first channel is shown, too.

    Returns
    -------
    ``{plane}_fixed``, ``{plane}_before``, ``{plane}_after`` (rows, columns), the same with ``_representation`` if
    asked for, and ``{plane}_spacing_mm`` (2,). Rows and columns are array axes as they come: axial (y, x), coronal
    (z, x), sagittal (z, y), slice (y, x). NaN where the moving volume has no voxel.
    """
    centre = fixed.grid.index_zyx(fixed.centroid_mm)
    kinds = {"": images}
    if representation:
        kinds["_representation"] = (fixed.values[0], moving.values[0])
    panels: dict[str, NDArray[np.float32]] = {}
    for plane, axis in (SLICE if fixed.grid.planar else PLANES).items():
        cut = int(np.clip(round(centre[axis]), 0, fixed.grid.shape_zyx[axis] - 1))
        spacing = [s for other, s in enumerate(fixed.grid.spacing_mm) if other != axis]
        panels[f"{plane}_spacing_mm"] = np.asarray(spacing, dtype=np.float32)
        for suffix, (fixed_values, moving_values) in kinds.items():
            panels[f"{plane}_fixed{suffix}"] = np.take(fixed_values, cut, axis=axis).astype(np.float32)
            for name, transform in (("before", before), ("after", after)):
                panels[f"{plane}_{name}{suffix}"] = _resampled(
                    moving_values, moving.grid, fixed.grid, transform, axis, cut
                )
    return panels


def _resampled(
    values: NDArray[np.float32], grid: Grid, onto: Grid, transform: PointMap, axis: int, cut: int
) -> NDArray[np.float32]:
    ranges = [np.arange(n) for n in onto.shape_zyx]
    ranges[axis] = np.asarray([cut])
    index = np.squeeze(np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1), axis=axis)
    place = grid.index_zyx(transform.apply(onto.world_mm(index)))
    plane = ndimage.map_coordinates(values, np.moveaxis(place, -1, 0), order=1, mode="nearest")
    # To the edges of the outer voxels, not only to their centres: half a voxel further.
    inside = ((place >= -0.5) & (place <= np.asarray(values.shape) - 0.5)).all(axis=-1)
    # The report leaves NaN empty. Zero would be drawn as air, or as specimen.
    return np.where(inside, plane, np.nan).astype(np.float32)
