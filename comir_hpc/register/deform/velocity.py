"""Find the stationary velocity whose flow brings the moving maps onto the fixed ones.

Each step is a Gauss-Newton step, solved in a Gaussian window about every point of the lattice: all voxels of the window
move as one. The deviation of the window is the smoothness length. What a window shows is weighed against what is
expected: that the velocity is that of its surroundings, give or take half a voxel. A window of weak agreement shows
less, and follows its surroundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from comir_hpc.register.deform.forces import Comparison, LocalCorrelation, as_fixed
from comir_hpc.register.deform.warping import Array, carried, exponential, indices, pooled, sample
from comir_hpc.space.grid import Grid

_STEPS = 10  # of each level
_WINDOW_VOX = 3.0  # deviation of the window of local correlation, in voxels of the level
_LONGEST_VOX = 1.5  # longest step, in voxels of the level
_EXPECTED_VOX = (
    0.5  # deviation from the velocity of the surroundings that is expected, in voxels of the level
)
_ALIKE_VOXELS = 27.0  # voxels whose residuals are one observation: neighbours have nearly the same
_LEAST = 1e-4  # what is expected even where nothing is left unexplained, so that flat places can be solved
_LEAST_SIGMA_VOX = 3.0  # smallest deviation of the window of a step, in voxels of the level
_PER_LENGTH = (
    3  # lattice points along a smoothness length: a trilinear field then bends as smoothly as its velocity
)
_ENOUGH_VOX = 0.01  # a mean step, in voxels of the level, that ends it


@dataclass(frozen=True, eq=False)
class Maps:
    """Both volumes as they are compared at one level.

    Attributes
    ----------
    fixed, moving : (c, z, y, x) float32
        Maps of both, each on its own grid.
    grid : Grid
        Grid of the fixed maps.
    weights : (z, y, x) float32
        Weights of the fixed voxels; 0 where nothing is compared.
    known : (z, y, x) float32 or None
        1 where the moving volume was measured; None if that is everywhere.
    matrix, offset : (3, 3), (3,)
        Map of fixed voxel indices to moving ones (z, y, x), by the coarse answer.
    alike : bool
        Whether equal values mean the same in both, as in learned maps. Otherwise moving values are first given those of
        the fixed volume that they mostly lie on (`as_fixed`).
    """

    fixed: Array
    moving: Array
    grid: Grid
    weights: Array
    known: Array | None
    matrix: Array
    offset: Array
    alike: bool

    def seen(self, displacement_mm: Array | None = None) -> tuple[Array, Array]:
        """Look the moving maps up on the fixed grid, displaced along its axes by (3, z, y, x) mm; and the weights."""
        place = indices(self.weights.shape)
        if displacement_mm is not None:
            place = place + displacement_mm / spacings(self.grid)
        place = np.einsum("ij,j...->i...", self.matrix, place) + self.offset[:, None, None, None]
        place = place.astype(np.float32)
        last = np.asarray(self.moving.shape[1:], dtype=np.float32)[:, None, None, None]
        inside = ((place >= -0.5) & (place <= last - 0.5)).all(axis=0)
        weights = self.weights * inside
        if self.known is not None:
            weights = weights * sample(self.known[None], place, outside="zeros")[0]
        return sample(self.moving, place), weights.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Velocity:
    """A stationary velocity of the fixed world.

    Attributes
    ----------
    values_mm : (3, z, y, x) float32
        Velocity along the z, y and x axes of the grid, in mm.
    grid : Grid
        Grid of the points at which the velocity is known.
    """

    values_mm: Array
    grid: Grid

    def displacement_mm(self) -> Array:
        """Return where the flow has carried every point of the lattice after the unit of time."""
        spacing = spacings(self.grid)
        return exponential(self.values_mm / spacing) * spacing


def spacings(grid: Grid) -> Array:
    """Return the spacing along z, y, x in mm, shaped for fields (3, z, y, x)."""
    return np.asarray(grid.spacing_mm, dtype=np.float32)[:, None, None, None]


def find_velocity(
    levels: Sequence[Maps],
    smoothness_mm: float,
    progress: Callable[[int, int], None] | None = None,
) -> Velocity:
    """Find the velocity, coarse to fine.

    Parameters
    ----------
    levels : sequence of Maps
        What is compared at each level, the coarsest first; their grids have the same axes.
    smoothness_mm : float
        Smoothness length in mm. On coarse levels it is at least three voxels.
    progress : callable, optional
        Function that is called as ``progress(done, total)``.
    """
    found: Velocity | None = None
    for number, level in enumerate(levels):
        sigma_mm = max(smoothness_mm, _LEAST_SIGMA_VOX * level.grid.finest_mm)
        ratio = max(1, int(sigma_mm / level.grid.finest_mm / _PER_LENGTH))
        # The lattice goes on beyond the volume, by a smoothness length, in which the motion ends. A specimen that
        # reaches the faces of its volume moves there, too.
        margin = math.ceil(sigma_mm / (ratio * level.grid.finest_mm))
        inner = level.grid.downsampled((ratio,) * 3)
        lattice = inner.crop(inner.box.grown((margin,) * 3))
        start = np.zeros((3, *lattice.shape_zyx), np.float32)
        if found is not None:
            start = _ending(carried(found.values_mm, found.grid, lattice), margin)
        found = Velocity(start, lattice)
        compared = LocalCorrelation(level.fixed, _WINDOW_VOX)
        for step in range(_STEPS):
            seen, weights = level.seen(carried(found.displacement_mm(), lattice, level.grid))
            if not level.alike:
                seen = as_fixed(level.fixed, seen, weights)
            found, moved_vox = _stepped(
                found, compared.at(seen, weights), level.grid, ratio, margin, sigma_mm
            )
            if progress is not None:
                progress(number * _STEPS + step + 1, len(levels) * _STEPS)
            if moved_vox < _ENOUGH_VOX:
                break
    assert found is not None
    return found


def _stepped(
    velocity: Velocity, seen: Comparison, grid: Grid, ratio: int, margin: int, sigma_mm: float
) -> tuple[Velocity, float]:
    """Take one step; return the new velocity and the mean step in voxels of the level."""
    sigma = [sigma_mm / s for s in velocity.grid.spacing_mm]
    voxel = spacings(grid)
    every = np.concatenate([seen.pull, seen.stiffness, seen.cost[None], seen.weights[None]])
    shown = _smooth(np.pad(pooled(every, ratio), ((0, 0), *((margin, margin),) * 3)), sigma)
    pull, stiffness, cost, share = shown[:3], shown[3:9], shown[9], shown[10]
    # What is left unexplained is noise for a step: the more there is, the more voxels it takes to move a place.
    noise = np.minimum(cost / np.maximum(share, 1e-3), 1)
    in_window = math.prod(2 * math.sqrt(math.pi) * sigma_mm / s for s in grid.spacing_mm)
    expected = (np.float32(_ALIKE_VOXELS / (in_window * _EXPECTED_VOX**2)) * noise + _LEAST).astype(
        np.float32
    )
    drawn = (_smooth(velocity.values_mm, sigma) - velocity.values_mm) / voxel
    step = _solved(stiffness, expected, pull + expected * drawn)
    length = np.sqrt((step**2).sum(axis=0))
    step *= np.minimum(1, _LONGEST_VOX / np.maximum(length, 1e-9))
    values = velocity.values_mm + _smooth(step, [0.5 * s for s in sigma]) * voxel
    return Velocity(_ending(values, margin), velocity.grid), float(np.minimum(length, _LONGEST_VOX).mean())


def _solved(stiffness: Array, added: Array, right: Array) -> Array:
    """Solve three equations at every point: the symmetric matrix (zz, yy, xx, zy, zx, yx) with its diagonal raised."""
    zz, yy, xx = stiffness[:3].astype(np.float64) + added
    zy, zx, yx = stiffness[3:].astype(np.float64)
    first = (yy * xx - yx * yx, zx * yx - zy * xx, zy * yx - yy * zx)
    second = (first[1], zz * xx - zx * zx, zx * zy - zz * yx)
    third = (first[2], second[2], zz * yy - zy * zy)
    whole = zz * first[0] + zy * first[1] + zx * first[2]
    rows = [sum(a * b for a, b in zip(row, right, strict=True)) / whole for row in (first, second, third)]
    return np.stack(rows).astype(np.float32)


def _smooth(values: Array, sigma: Sequence[float]) -> Array:
    return np.stack([ndimage.gaussian_filter(v, sigma, mode="nearest", truncate=3.0) for v in values])


def _ending(values: Array, margin: int) -> Array:
    """Let the motion end within the margin of the lattice: nothing moves at its faces, or beyond."""
    for axis in range(1, 4):
        n = values.shape[axis]
        away = np.minimum(np.arange(n), np.arange(n)[::-1])
        ramp = np.minimum(1, away / max(1, margin)).astype(np.float32)
        values = values * ramp.reshape([-1 if a == axis else 1 for a in range(4)])
    return values
