"""Interpolate thick slices onto a grid of nearly cubic voxels, on which intensities are compared.

Mutual information between thick slices and a fine volume has its optimum beside the truth. Linear interpolation blurs
between two slices and not on them, so that the distribution of values changes with the position. It was measured on the
2 mm brain with slices of 6 mm in the moving volume, in both, and along different axes: errors were 1.7, 1.1 and 1.1 mm.
With the same volumes interpolated by cubic splines first, they were 0.4, 0.3 and 0.3 mm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from comir_hpc.representations.features import Features
from comir_hpc.space.grid import MM_PER_UNIT, Grid, Triple

_THICK = 1.5  # an axis is interpolated if its spacing is at least so many times the finest one


def pieces(grid: Grid) -> Triple:
    """Choose into how many voxels each voxel is cut along z, y, x; all are 1 if voxels are about cubic already."""
    spacing = np.asarray(grid.spacing_mm)
    ratio = spacing / grid.finest_mm
    counted = np.isin(np.arange(3), grid.axes)  # the thickness of a single slice does not count
    z, y, x = np.where(counted & (ratio >= _THICK), np.rint(ratio), 1).astype(int).tolist()
    return z, y, x


def cut_grid(grid: Grid) -> Grid:
    """Make the grid of the same extent whose voxels are about cubic."""
    parts = pieces(grid)
    spacing = [s / n for s, n in zip(grid.spacing_zyx, parts, strict=True)]
    shape = [size * n for size, n in zip(grid.shape_zyx, parts, strict=True)]
    origin = grid.world_mm([(1 / n - 1) / 2 for n in parts]) / MM_PER_UNIT[grid.unit]
    return Grid(
        (shape[0], shape[1], shape[2]),
        (spacing[0], spacing[1], spacing[2]),
        (float(origin[0]), float(origin[1]), float(origin[2])),
        grid.direction,
        grid.unit,
    )


def on_cubic_voxels(features: Features) -> Features:
    """Interpolate features along thick axes by cubic splines, within the range of the values.

    Features whose voxels are about cubic are returned as they are.
    """
    parts = pieces(features.grid)
    if parts == (1, 1, 1):
        return features
    known = None if features.known is None else _repeated(features.known, parts)
    values = np.stack([_interpolated(channel, parts) for channel in features.values])
    return replace(
        features,
        values=values,
        mask=_repeated(features.mask, parts),
        grid=cut_grid(features.grid),
        known=known,
    )


def _interpolated(values: NDArray[np.float32], parts: Triple) -> NDArray[np.float32]:
    low, high = values.min(), values.max()
    for axis, number in enumerate(parts):
        if number > 1:
            places = (np.arange(values.shape[axis] * number) + 0.5) / number - 0.5
            weights = _spline_weights(values.shape[axis], places)
            values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    # Splines overshoot beside an edge. Values that the volume does not have are cut off.
    return np.clip(values, low, high)


def _repeated(mask: NDArray[np.bool_], parts: Triple) -> NDArray[np.bool_]:
    for axis, number in enumerate(parts):
        mask = np.repeat(mask, number, axis=axis)
    return mask


def _spline_weights(size: int, places: NDArray[np.float64]) -> NDArray[np.float32]:
    """Make the weights (places, size) of the voxels along an axis; beyond the outer ones their value is held."""
    # The spline of a unit vector is the weight of its voxel. Made once, the weights serve every line of the volume.
    spline = CubicSpline(np.arange(size), np.eye(size), bc_type="natural")
    return np.asarray(spline(np.clip(places, 0, size - 1)), dtype=np.float32)
