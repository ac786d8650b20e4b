"""Find the stationary velocity whose flow brings the moving maps onto the fixed ones.

Each step is a Gauss-Newton step, solved in a Gaussian window about every point of the lattice: all voxels of the window
move as one. The deviation of the window is the smoothness length. Where the window shows little, the step is drawn to
the smoothed velocity of its surroundings instead of to the maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from comir_hpc.register.deform.forces import Comparison, LocalCorrelation
from comir_hpc.register.deform.warping import Array, exponential, indices, pooled, refined, sample

_LONGEST_VOX = 1.5  # longest step, in voxels of the level
_PRIOR = 0.05  # strength of the surroundings' velocity over the mean stiffness
_ENOUGH = 0.02  # a mean step, in voxels of the level, that ends it


@dataclass(frozen=True)
class Stage:
    """One level of the optimiser.

    Attributes
    ----------
    shrink : int
        Voxels of the working grid along each side of one voxel of the level.
    window_vox : float
        Deviation of the window of local correlation, in voxels of the level.
    steps : int
        Largest number of steps.
    """

    shrink: int
    window_vox: float
    steps: int


@dataclass(frozen=True, eq=False)
class Maps:
    """Both volumes as they are compared.

    Attributes
    ----------
    fixed, moving : (c, z, y, x) float32
        Maps of both, each on its own grid.
    weights : (z, y, x) float32
        Weights of the fixed voxels; 0 where nothing is compared.
    known : (z, y, x) float32 or None
        1 where the moving volume was measured; None if that is everywhere.
    matrix, offset : (3, 3), (3,)
        Map of fixed voxel indices to moving ones (z, y, x), by the coarse answer.
    signed : bool
        Whether only a positive correlation counts.
    """

    fixed: Array
    moving: Array
    weights: Array
    known: Array | None
    matrix: Array
    offset: Array
    signed: bool

    def seen(self, displacement: Array | None) -> tuple[Array, Array]:
        """Look the moving maps up on the fixed grid, displaced by (3, z, y, x) voxels; and the weights there."""
        place = indices(self.weights.shape)
        if displacement is not None:
            place = place + displacement
        place = np.einsum("ij,j...->i...", self.matrix, place) + self.offset[:, None, None, None]
        place = place.astype(np.float32)
        last = np.asarray(self.moving.shape[1:], dtype=np.float32)[:, None, None, None]
        inside = ((place >= -0.5) & (place <= last - 0.5)).all(axis=0)
        weights = self.weights * inside
        if self.known is not None:
            weights = weights * sample(self.known[None], place, outside="zeros")[0]
        return sample(self.moving, place), weights.astype(np.float32)

    def shrunk(self, factor: int) -> Maps:
        """Return both on voxels that are `factor` times as large along each axis."""
        if factor == 1:
            return self
        # The maps are weighted, so that what is outside the specimen does not run into it.
        weights = pooled(self.weights[None], factor)
        share = np.maximum(weights, 1e-6)
        # An index of the coarse grid is (i + 1/2) / factor - 1/2, on both sides.
        shift = (self.matrix.sum(axis=1) * (factor - 1) / 2 + self.offset - (factor - 1) / 2) / factor
        return Maps(
            np.where(weights > 1e-6, pooled(self.fixed * self.weights, factor) / share, 0).astype(np.float32),
            pooled(self.moving, factor),
            weights[0],
            None if self.known is None else pooled(self.known[None], factor)[0],
            self.matrix,
            shift.astype(np.float32),
            self.signed,
        )


@dataclass(frozen=True, eq=False)
class Velocity:
    """A stationary velocity on a lattice.

    Attributes
    ----------
    values : (3, z, y, x) float32
        Velocity along z, y, x in voxels of the lattice.
    factor : int
        Working voxels along each side of one voxel of the lattice.
    """

    values: Array
    factor: int

    def on(self, shape_zyx: tuple[int, ...], factor: int) -> Velocity:
        """Return it on another lattice."""
        if factor == self.factor:
            return self
        return Velocity(refined(self.values, shape_zyx, self.factor / factor), factor)


def find_velocity(
    maps: Maps,
    stages: tuple[Stage, ...],
    smoothness_vox: float,
    lattice: int,
    start: Velocity | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Velocity:
    """Find the velocity, coarse to fine.

    Parameters
    ----------
    maps : Maps
        What is compared, on the working grid.
    stages : tuple of Stage
        Levels, the coarsest first.
    smoothness_vox : float
        Smoothness length in working voxels.
    lattice : int
        Working voxels along each side of one voxel of the finest lattice.
    start : Velocity, optional
        Where to begin; at rest when not given.
    progress : callable, optional
        Function that is called as ``progress(done, total)``.
    """
    found = start
    total, done = sum(stage.steps for stage in stages), 0
    for stage in stages:
        level = maps.shrunk(stage.shrink)
        factor = max(lattice, stage.shrink)
        shape = tuple(-(-n // factor) for n in maps.weights.shape)
        velocity = np.zeros((3, *shape), np.float32) if found is None else found.on(shape, factor).values
        compared = LocalCorrelation(level.fixed, stage.window_vox, signed=level.signed)
        sigma = max(smoothness_vox / factor, 1.0)
        for number in range(stage.steps):
            seen, weights = level.seen(_on_level(exponential(velocity), level, factor // stage.shrink))
            velocity, moved = _stepped(velocity, compared.at(seen, weights), factor // stage.shrink, sigma)
            if progress is not None:
                progress(done + number + 1, total)
            if moved < _ENOUGH:
                break
        done += stage.steps
        found = Velocity(velocity, factor)
    assert found is not None
    return found


def _on_level(displacement: Array, level: Maps, ratio: int) -> Array:
    return refined(displacement, level.weights.shape, ratio)


def _stepped(velocity: Array, seen: Comparison, ratio: int, sigma: float) -> tuple[Array, float]:
    """Take one step on the lattice; return the new velocity and the mean step in voxels of the level."""
    pull = _smooth(pooled(seen.pull, ratio), sigma)
    stiffness = _smooth(pooled(seen.stiffness, ratio), sigma)
    zz, yy, xx, zy, zx, yx = stiffness
    matrix = np.stack(
        [np.stack([zz, zy, zx], -1), np.stack([zy, yy, yx], -1), np.stack([zx, yx, xx], -1)], -2
    ).astype(np.float64)
    held = zz + yy + xx
    mean = float(held.mean(where=held > 0.01 * held.max())) / 3 if held.max() > 0 else 1.0
    drawn = _smooth(velocity, sigma) - velocity
    prior = _PRIOR * mean
    right = np.moveaxis(pull, 0, -1) + prior * ratio * np.moveaxis(drawn, 0, -1)
    step = np.linalg.solve(matrix + prior * np.eye(3), right[..., None].astype(np.float64))[..., 0]
    step = _smooth(np.moveaxis(step, -1, 0).astype(np.float32), 0.5 * sigma)
    length = np.sqrt((step**2).sum(axis=0))
    step = step * np.minimum(1, _LONGEST_VOX / np.maximum(length, 1e-9))
    new = (velocity + step / np.float32(ratio)).astype(np.float32)
    return _still_at_border(new), float(np.minimum(length, _LONGEST_VOX).mean())


def _smooth(values: Array, sigma: float) -> Array:
    return np.stack([ndimage.gaussian_filter(v, sigma, mode="nearest", truncate=3.0) for v in values])


def _still_at_border(velocity: Array) -> Array:
    """Let nothing move at the faces of the lattice, so that what lies outside goes on from there."""
    for axis in range(1, 4):
        n = velocity.shape[axis]
        ramp = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 2).astype(np.float32)
        velocity = velocity * ramp.reshape([-1 if a == axis else 1 for a in range(4)])
    return velocity
