"""Make right and wrong pairs of a family: what is done to the moving volume, and where the truth then lies.

Volumes are about 56 voxels across, so that a row costs a second. A pair with a truth is displaced, encoded after that,
and spoiled in one of several ways. A pair without one shows something else: the mirrored specimen, its blocks in
another order, noise of its outline, or another family's specimen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cases import LEVELS, drawn, specimen
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.data.families import Pair as Known
from comir_hpc.data.families import family
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.volumes.volume import downsample

ACROSS = 56
SPOILED = ("plain", "noisy", "thick", "cropped", "deformed", "padded")
"""Pairs that have a right answer."""
WITHOUT = ("mirrored", "shuffled", "noise", "other")
"""Pairs that have none."""
Volume = tuple[NDArray[np.float32], Grid]


@dataclass(frozen=True)
class Pair:
    """Two volumes, the transform between them if there is one, and points of the fixed specimen in mm."""

    fixed: Volume
    moving: Volume
    truth: Transform | None
    points_mm: NDArray[np.float64]


def small(volume: Volume, across: int = ACROSS) -> Volume:
    """Average a volume down to about so many voxels along its specimen's mean side."""
    values, grid = volume
    inside = np.argwhere(specimen(values))
    side = float((np.ptp(inside, axis=0) * grid.spacing_mm).mean())
    factors = tuple(max(1, round(side / across / s)) for s in grid.spacing_mm)
    return downsample(values[None], factors)[0], grid.downsampled(factors)


class Maker:
    """Make the pairs of one family and seed."""

    def __init__(self, family: Known, seed: int, other: Known, across: int = ACROSS) -> None:
        self.rng = np.random.default_rng([seed, sum(map(ord, family.name))])
        self.fixed, whole = small(family.fixed, across), small(family.moving, across)
        self.points_mm = family.inside_mm[::4]
        self.other = small(other.moving, across)
        level = list(LEVELS)[seed % len(LEVELS)]
        motion = drawn(self.rng, level, *whole)
        self.moving = displaced(whole, motion)
        self.truth = motion.compose(family.answer.transform)
        self.searched: dict[str, list[tuple[str, Transform]]] = {}

    def pair(self, name: str) -> Pair:
        """Make one of `SPOILED` or `WITHOUT`."""
        truth = self.truth if name in SPOILED else None
        return Pair(self.fixed, getattr(self, f"_{name}")(*self.moving), truth, self.points_mm)

    def _plain(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        return values, grid

    def _noisy(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        spread = 0.1 * float(np.percentile(values, 99))
        return values + self.rng.normal(0, spread, values.shape).astype(np.float32), grid

    def _thick(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        factors = tuple(np.roll((3, 1, 1), int(self.rng.integers(3))).tolist())
        return downsample(values[None], factors)[0], grid.downsampled(factors)

    def _cropped(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        axis = int(self.rng.integers(3))
        inside = np.argwhere(specimen(values))[:, axis]
        cut = [slice(None)] * 3
        cut[axis] = slice(0, int(np.percentile(inside, 70)))
        return values[tuple(cut)], replace(grid, shape_zyx=values[tuple(cut)].shape)

    def _deformed(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        index = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij")).astype(float)
        for axis in index:
            axis += 0.6 * _smooth(self.rng, values.shape, 10.0)
        bias = np.exp(0.25 * _smooth(self.rng, values.shape, 16.0))
        return (ndimage.map_coordinates(values, index, order=1) * bias).astype(np.float32), grid

    def _padded(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        room = tuple(int(n) for n in self.rng.integers(4, 16, 3))
        padded = np.pad(values, [(n, 0) for n in room])
        origin = grid.world_mm([-n for n in room])
        return padded, replace(grid, shape_zyx=padded.shape, origin_xyz=tuple(origin.tolist()))

    def _mirrored(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        return np.ascontiguousarray(values[..., ::-1]), grid

    def _shuffled(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        side, inside = 8, specimen(values)
        places = [
            tuple(slice(i * side, (i + 1) * side) for i in index)
            for index in np.ndindex(*(n // side for n in values.shape))
        ]
        full = [place for place in places if inside[place].mean() > 0.5]
        made = values.copy()
        for to, source in zip(full, self.rng.permutation(len(full)), strict=True):
            made[to] = values[full[source]]
        return made, grid

    def _noise(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        inside = specimen(values)
        texture = _smooth(self.rng, values.shape, 2.0)
        mean, spread = float(values[inside].mean()), float(values[inside].std())
        outside = float(np.median(values[~inside]))
        return np.where(inside, np.maximum(mean + spread * texture, 0.3 * mean), outside).astype(
            np.float32
        ), grid

    def _other(self, values: NDArray[np.float32], grid: Grid) -> Volume:
        del values, grid
        return self.other


def displaced(volume: Volume, motion: Transform) -> Volume:
    """See a volume as a second scanner does, in which the specimen lies turned and shifted."""
    values, grid = volume
    longest = 1.15 * max(grid.extent_mm)
    shape = tuple(int(np.ceil(longest / s)) for s in grid.spacing_mm)
    middle = grid.world_mm(ndimage.center_of_mass(specimen(values)))
    corner = middle - grid.matrix_mm[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    scanner = Grid(shape, grid.spacing_mm, tuple(corner.tolist()), grid.direction)
    back = np.linalg.inv(grid.matrix_mm) @ motion.inverse().matrix_mm @ scanner.matrix_mm
    moved = ndimage.affine_transform(values, back[:3, :3], back[:3, 3], output_shape=shape, order=1)
    return moved.astype(np.float32), scanner


def families(data: Path, names: list[str]) -> dict[str, Known]:
    """Open families by name."""
    return {name: family(name, data) for name in names}


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> NDArray[np.float64]:
    """Make smooth noise of unit deviation."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return np.asarray(field / field.std())
