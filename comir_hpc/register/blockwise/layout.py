"""How a volume is cut into blocks that overlap, and how their solutions are put together. Integers and profiles only.

Three things lie on one another: the working grid on which volumes are compared; the lattice of the displacement, each
of whose points stands for a cube of voxels of that grid; and the blocks, each of which owns a box of lattice points,
its core. Every number counts from the start of the whole grid. So a block, and the weight of its solution at a point,
are the same however the work is split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from comir_hpc.space.grid import Box, FloatArray, Grid, Triple, as_triple
from comir_hpc.space.plan import BlockPlan, plan_blocks

PER_LENGTH = 3
"""Points of the lattice along a smoothness length."""
_COARSEST = 8  # voxels along each side that a lattice point stands for, at most
_OVERLAP = 1.0  # smoothness lengths by which the solution of a block counts beyond its core
_HALO = 3.0  # smoothness lengths around the core that a block looks at: two more than count
_SIDES_VOX = (4, 16)  # least and largest side of a cube that is held out


@dataclass(frozen=True)
class Layout:
    """Blocks of one volume.

    Attributes
    ----------
    grid : Grid
        Working grid of the fixed volume.
    smoothness_mm : float
        Smoothness length in mm.
    block : int
        Voxels along each side of a core that were asked for; cores are made alike along each axis.
    """

    grid: Grid
    smoothness_mm: float
    block: int

    @cached_property
    def ratio(self) -> int:
        """Voxels along each side of what a lattice point stands for."""
        return int(np.clip(self.smoothness_mm / self.grid.finest_mm / PER_LENGTH, 1, _COARSEST))

    @cached_property
    def length(self) -> int:
        """Smoothness length in lattice points, rounded up."""
        return math.ceil(self.smoothness_mm / (self.ratio * self.grid.finest_mm) - 1e-6)

    @cached_property
    def lattice(self) -> Grid:
        """Grid of the displacement. It goes on beyond the volume by a smoothness length, in which the motion ends."""
        inner = self.grid.downsampled((self.ratio,) * 3)
        return inner.crop(inner.box.grown((self.length,) * 3))

    @cached_property
    def plan(self) -> BlockPlan:
        """Cores of the blocks, boxes of lattice points."""
        wanted = max(1, self.block // self.ratio)
        shape = self.lattice.shape_zyx
        core = [-(-n // max(1, round(n / wanted))) for n in shape]
        return plan_blocks(shape, as_triple(core, int))

    @cached_property
    def overlap(self) -> int:
        """Lattice points by which the solution of a block counts beyond its core, on each side."""
        return max(1, round(_OVERLAP * self.length))

    @cached_property
    def tile_zyx(self) -> Triple:
        """Lattice points that the solution of a block is known at: the core and what it overlaps."""
        return as_triple([c + 2 * self.overlap for c in self.plan.core_zyx], int)

    @cached_property
    def held_side(self) -> int:
        """Side in voxels of a cube that is held out, about half a smoothness length, in whole lattice points."""
        return int(np.clip(2 * self.ratio, *_SIDES_VOX))

    @cached_property
    def halo(self) -> int:
        """Voxels around a core that a block looks at."""
        return math.ceil(_HALO * self.smoothness_mm / self.grid.finest_mm)

    def tile(self, index: int) -> Box:
        """Lattice points at which a block's solution is known; at the faces they may lie beyond the lattice."""
        start = self.plan[index].write.start
        stop = [a + c for a, c in zip(start, self.plan.core_zyx, strict=True)]
        return Box(start, as_triple(stop, int)).grown((self.overlap,) * 3)

    def core(self, index: int) -> Box:
        """Voxels of the working grid in the core of a block; empty where it lies wholly beyond the volume."""
        return self._voxels(self.plan[index].write)

    def near(self, index: int) -> Box:
        """Voxels of the working grid where the solution of a block counts."""
        return self._voxels(self.tile(index))

    def seen(self, index: int) -> Box:
        """Voxels of the working grid that a block looks at.

        It begins at a multiple of the cubes' pattern, so that all blocks hold out the same voxels, and have their
        lattice points at the same places.
        """
        core = self.core(index)
        step = 2 * self.held_side
        grown = core.grown((self.halo,) * 3)
        start = [a // step * step for a in grown.start]
        return Box(as_triple(start, int), grown.stop).intersect(self.grid.box)

    def largest(self) -> Triple:
        """Sides of the largest box that a block looks at."""
        room = 2 * self.halo + 2 * self.held_side
        sides = zip(self.plan.core_zyx, self.grid.shape_zyx, strict=True)
        return as_triple([min(c * self.ratio + room, n) for c, n in sides], int)

    def touching(self, box: Box) -> list[int]:
        """Numbers of the blocks whose solution counts somewhere in a box of the lattice, in ascending order."""
        ranges = []
        for start, stop, core, count in zip(
            box.start, box.stop, self.plan.core_zyx, self.plan.counts_zyx, strict=True
        ):
            first = max(0, (start - self.overlap) // core)
            last = min(count - 1, (stop - 1 + self.overlap) // core)
            ranges.append(range(first, last + 1))
        places = np.stack(np.meshgrid(*map(np.asarray, ranges), indexing="ij"), axis=-1).reshape(-1, 3)
        return [int(np.ravel_multi_index(tuple(place), self.plan.counts_zyx)) for place in places]

    def weights(self, index: int, box: Box) -> FloatArray:
        """Weights (z, y, x) of a block's solution at the lattice points of a box; over all blocks they sum to 1."""
        place = np.unravel_index(index, self.plan.counts_zyx)
        z, y, x = (
            self._profiles[axis][int(p), start:stop]
            for axis, (p, start, stop) in enumerate(zip(place, box.start, box.stop, strict=True))
        )
        return np.asarray(z[:, None, None] * y[None, :, None] * x[None, None, :])

    @cached_property
    def _profiles(self) -> list[FloatArray]:
        """Weights along each axis, (blocks, lattice points)."""
        found = []
        for size, core, count in zip(
            self.lattice.shape_zyx, self.plan.core_zyx, self.plan.counts_zyx, strict=True
        ):
            points, width = np.arange(size, dtype=np.float64), self.overlap + 0.5
            rows = []
            for number in range(count):
                # At the outer faces there is no neighbour to hand over to.
                row = np.ones(size)
                if number > 0:
                    row *= _step((points - (number * core - 0.5)) / width)
                if number < count - 1:
                    row *= _step((((number + 1) * core - 0.5) - points) / width)
                rows.append(row)
            profile = np.stack(rows)
            found.append(profile / profile.sum(axis=0))
        return found

    def _voxels(self, points: Box) -> Box:
        """Voxels of the working grid that lattice points stand for."""
        start = [(a - self.length) * self.ratio for a in points.start]
        stop = [(b - self.length) * self.ratio for b in points.stop]
        return Box(as_triple(start, int), as_triple(stop, int)).intersect(self.grid.box)


def _step(share: FloatArray) -> FloatArray:
    """Rise from 0 at -1 to 1 at 1, with no slope at both ends."""
    x = (np.clip(share, -1, 1) + 1) / 2
    return np.asarray(x * x * (3 - 2 * x))
