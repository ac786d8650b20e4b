"""One modality's volume under the patches of a specimen: on the specimen's grid, or on one of its own.

A patch is one affine map in the world for all modalities. It is drawn in voxels of the specimen's grid, that of the
first modality. A volume on another grid is looked up in its own voxels, so that nothing is interpolated twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.space.grid import Box, FloatArray, Grid
from comir_hpc.volumes.padding import Unpadded
from comir_hpc.volumes.volume import Volume

# Times that the voxels that are looked up may be coarser than those of the patch. So they are at most 1.7 times finer.
_COARSER = 1.2


@dataclass(frozen=True, eq=False)
class View:
    """A volume at the level that suits the patches of a specimen.

    Attributes
    ----------
    volume : Volume
        The volume.
    level : int
        Level that is read. Of a volume on a grid of its own, it is the coarsest one whose voxels are about as fine as
        those of the specimen's grid, so that what is much finer is averaged and not folded into a patch.
    grid : Grid
        Grid of that level.
    linear, offset : (3, 3) and (3,) float64, or None
        Map from voxels (z, y, x) of the specimen's grid to voxels of the level. None where both are one grid, so that
        positions there are used as they are, to the last bit.
    """

    volume: Volume
    level: int
    grid: Grid
    linear: FloatArray | None = None
    offset: FloatArray | None = None

    @classmethod
    def of(cls, volume: Volume, first: Volume, level: int) -> View:
        """Make the view of a volume for a specimen whose grid is a level of its first volume."""
        if volume.grid.agrees_with(first.grid):
            return cls(volume, level, volume.level_grid(level))
        specimen = first.level_grid(level)
        own = nearest_level(volume, specimen)
        grid = volume.level_grid(own)
        # By way of the world: index of the specimen, millimetres, index of this level.
        to_own = np.linalg.inv(grid.matrix_mm) @ specimen.matrix_mm
        return cls(volume, own, grid, to_own[:3, :3], to_own[:3, 3])

    @property
    def num_bytes(self) -> int:
        """Bytes of the level, in the volume's own dtype."""
        return self.volume.num_channels * self.volume.dtype.itemsize * math.prod(self.grid.shape_zyx)

    @property
    def shared(self) -> bool:
        """Whether the volume lies on the specimen's grid."""
        return self.linear is None

    def places(self, points_zyx: FloatArray) -> FloatArray:
        """Convert points (..., 3) from voxels of the specimen's grid to voxels of the level."""
        if self.linear is None or self.offset is None:
            return points_zyx
        found: FloatArray = points_zyx @ self.linear.T + self.offset
        return found

    def inside(self, points_zyx: FloatArray) -> NDArray[np.bool_]:
        """Say which points (..., 3) of the specimen's grid lie inside the volume."""
        place = self.places(points_zyx)
        # A voxel reaches half its size beyond its centre.
        last = np.asarray(self.grid.shape_zyx) - 0.5
        return np.asarray(((place >= -0.5) & (place <= last)).all(axis=-1), dtype=np.bool_)

    def box(self, corners_zyx: FloatArray) -> Box:
        """Find the voxels that interpolation between points (N, 3) of the specimen's grid needs; never none.

        Where the volume does not reach, it is the voxel nearest to the first of them.
        """
        corners, whole = self.places(corners_zyx), self.grid.box
        start = np.floor(corners.min(axis=0)).astype(int)
        # One voxel more than the last corner's: interpolation reads the voxels on both sides of a position.
        stop = np.floor(corners.max(axis=0)).astype(int) + 2
        wanted = _box(start, stop).intersect(whole)
        if wanted.size:
            return wanted
        nearest = np.clip(start, 0, np.asarray(whole.stop) - 1)
        return _box(nearest, nearest + 1)

    def foreground(self, box: Box) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Look up which voxels of a box of the specimen's grid are specimen, and which lie inside the volume.

        Both are (z, y, x). On another grid, the nearest voxel counts.
        """
        if self.shared:
            return self._above(box), np.ones(box.shape, dtype=np.bool_)
        axes = [np.arange(a, b, dtype=np.float64) for a, b in zip(box.start, box.stop, strict=True)]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        inside = self.inside(points)
        if not inside.any():
            return inside, inside
        source = self.box(points[inside])
        nearest = np.rint(self.places(points)).astype(int) - source.start
        z, y, x = np.moveaxis(np.clip(nearest, 0, np.asarray(source.shape) - 1), -1, 0)
        return self._above(source)[z, y, x] & inside, inside

    def _above(self, box: Box) -> NDArray[np.bool_]:
        above = np.zeros(box.shape, dtype=np.bool_)
        for channel, values in enumerate(Unpadded(self.volume).read(box, level=self.level)):
            above |= self.volume.intensity(channel).foreground(values)
        return above


def nearest_level(volume: Volume, wanted: Grid) -> int:
    """Find the coarsest level whose voxels are no more than 1.2 times coarser than the finest side of a grid's.

    Axes on which the volume has coarser voxels in any case do not count.
    """
    limit = np.maximum(_COARSER * wanted.finest_mm, np.asarray(volume.grid.spacing_mm)) * (1 + 1e-6)
    return max(
        level
        for level in range(volume.num_levels)
        if (np.asarray(volume.level_grid(level).spacing_mm) <= limit)[list(volume.grid.axes)].all()
    )


def _box(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Box:
    (z, y, x), (z1, y1, x1) = start.tolist(), stop.tolist()
    return Box((z, y, x), (z1, y1, x1))
