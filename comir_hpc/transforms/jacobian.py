"""By how much a displacement field stretches space: the determinant of its Jacobian, and where it folds.

Between the points of its lattice a displacement field is trilinear. At a corner of a cell its derivatives are exactly
the differences along the three edges that meet there. A lattice point is a corner of eight cells, each with its own
determinant. The least of the eight is what counts: a central difference can be positive where a cell is turned inside
out (Liu et al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from comir_hpc.space.grid import FloatArray, Grid


def least_determinant(moved_mm: FloatArray, grid: Grid) -> FloatArray:
    """Return, (z, y, x), the least determinant of the Jacobian in the cells about every lattice point.

    Parameters
    ----------
    moved_mm : (z, y, x, 3)
        Where the points of the lattice are sent, (x, y, z) in mm, as `PointMap.apply_to_grid` gives it.
    grid : Grid
        The lattice, with at least two points along each axis.
    """
    # In voxels of the lattice, the differences below are derivatives already, whatever the spacing and the
    # directions.
    index = np.moveaxis(moved_mm @ np.linalg.inv(grid.matrix_mm[:3, :3]).T, -1, 0)
    edges = [np.diff(index, axis=axis + 1) for axis in range(3)]
    least = np.full(grid.shape_zyx, np.inf)
    for sides in itertools.product((0, 1), repeat=3):
        columns = [
            _edge(edge, axis, side) for axis, (edge, side) in enumerate(zip(edges, sides, strict=True))
        ]
        a, b, c = columns
        volume = (
            a[0] * (b[1] * c[2] - b[2] * c[1])
            - b[0] * (a[1] * c[2] - a[2] * c[1])
            + c[0] * (a[1] * b[2] - a[2] * b[1])
        )
        least = np.minimum(least, volume)
    return least


def folded(determinant: FloatArray, within: NDArray[np.bool_] | None = None) -> int:
    """Count the points at which space is folded or squashed flat: those with a determinant of zero or less."""
    bad = determinant <= 0
    return int(bad.sum() if within is None else (bad & within).sum())


def _edge(edge: FloatArray, axis: int, ahead: int) -> FloatArray:
    """Return the edge that leaves every point ahead or behind; at a face, the only one there is."""
    last = edge.take([-1], axis=axis + 1) if ahead else edge.take([0], axis=axis + 1)
    parts = [edge, last] if ahead else [last, edge]
    return np.concatenate(parts, axis=axis + 1)
