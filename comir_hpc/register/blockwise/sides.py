"""One volume of a pair as blocks see it: any box of it, on working grids of rising spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.deform.warping import Array, carried
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.grid import WindowGrid
from comir_hpc.representations.encoding.reader import NormalisedReader
from comir_hpc.representations.features import Features, interior, specimen_mask
from comir_hpc.representations.working import working_grid
from comir_hpc.space.grid import Box, FloatArray, Grid, Vector
from comir_hpc.volumes.volume import Volume

MASK_VOXELS = 1 << 21
"""Voxels, at most, of the level on which the specimen is found: it is in memory as a whole."""


class Side:
    """One volume, seen box by box.

    Parameters
    ----------
    volume : Volume
        The volume.
    encoder : Encoder or None
        What encodes it; None where its intensities are compared.
    spacings_mm : sequence of three float
        Spacings (z, y, x) of the working grids, the finest first.
    inner : bool
        Whether the surface of the specimen is left out, as for models that do not know what lies on it.
    """

    def __init__(
        self, volume: Volume, encoder: Encoder | None, spacings_mm: Sequence[Vector], *, inner: bool = False
    ) -> None:
        self.volume, self.encoder, self.inner = volume, encoder, inner
        self.readers = [NormalisedReader(volume, working_grid(volume, s)) for s in spacings_mm]
        self._windows: dict[int, WindowGrid] = {}

    @property
    def num_channels(self) -> int:
        """Number of channels that are compared."""
        return 1 if self.encoder is None else self.encoder.latent_channels

    def grid(self, level: int) -> Grid:
        """Working grid at a level; 0 is the finest."""
        return self.readers[level].seen.grid

    def features(self, level: int, box: Box, *, everywhere: bool = False) -> Features:
        """Make the features of a box of a working grid; a voxel has the same values in every box that holds it.

        Parameters
        ----------
        level : int
            Number of the working grid.
        box : Box
            Voxels of that grid.
        everywhere : bool
            Whether the mask is left out: every voxel counts.
        """
        seen = self.readers[level].seen
        grid = seen.grid.crop(box)
        known = seen.known(box) if seen.padded else None
        mask = np.ones(box.shape, dtype=np.bool_) if everywhere else self.mask(grid)
        return Features(self._values(level, box), mask, grid, known)

    def mask(self, grid: Grid) -> NDArray[np.bool_]:
        """Say which voxels of a grid along the volume's axes belong to the specimen, (z, y, x)."""
        values, own = self._specimen
        return np.asarray(carried(values, own, grid, outside="zeros")[0] > 0.5, dtype=np.bool_)

    @cached_property
    def _specimen(self) -> tuple[Array, Grid]:
        """The specimen (1, z, y, x), 1 inside, on the finest level that is small enough to be in memory, with its grid.

        It is found on the whole volume, and not block by block, so that dark places within it are closed everywhere.
        """
        volume, level = self.volume, small_level(self.volume)
        mask = specimen_mask(volume, level)
        mask = interior(mask) if self.inner else mask
        return mask[None].astype(np.float32), volume.level_grid(level)

    def specimen_points_mm(self, most: int) -> FloatArray:
        """Points (N, 3) of the specimen, (x, y, z) in mm, evenly taken: at most twice as many as asked for."""
        values, grid = self._specimen
        found = np.argwhere(values[0] > 0.5)
        return grid.world_mm(found[:: max(1, len(found) // most)])

    def _values(self, level: int, box: Box) -> Array:
        reader = self.readers[level]
        if self.encoder is None:
            return reader(box)[:1]
        if level not in self._windows:
            self._windows[level] = self.encoder.windows(self.grid(level).shape_zyx)
        # The windows are those of the whole volume, so that neighbouring blocks see the same values.
        return self.encoder.encode(reader, self._windows[level], box, background=reader.background)


def small_level(volume: Volume) -> int:
    """Return the finest level that is small enough to be in memory as a whole."""
    fits = (
        level
        for level in range(volume.num_levels)
        if math.prod(volume.level_grid(level).shape_zyx) <= MASK_VOXELS
    )
    return next(fits, volume.num_levels - 1)
