"""A mask that restricts where a specimen counts: a volume on any grid, looked up at its nearest voxel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import Box, Grid

if TYPE_CHECKING:
    from comir_hpc.volumes.volume import Volume

_SLAB = 1 << 24  # voxels of the mask that are read at once


@dataclass(frozen=True, eq=False)
class Region:
    """Where a specimen counts.

    Attributes
    ----------
    mask : Volume
        Volume of one channel: what is not zero (and not NaN) counts.
    """

    mask: Volume

    def __post_init__(self) -> None:
        if self.mask.num_channels != 1:
            raise VolumeError(
                f"{self.mask.path} has {self.mask.num_channels} channels; expected a mask of one, not zero where the "
                "specimen counts"
            )

    def on(self, grid: Grid) -> NDArray[np.bool_]:
        """Return the mask (z, y, x) on a grid: that of the nearest voxel, and False outside of the mask's own grid.

        Raises
        ------
        VolumeError
            If the mask is empty, or lies wholly outside of the grid.
        """
        held, own = self._held, self.mask.grid
        result = np.zeros(grid.shape_zyx, dtype=np.bool_)
        covered = False
        for z in range(grid.shape_zyx[0]):
            voxels = np.stack(
                np.meshgrid([z], *(np.arange(n) for n in grid.shape_zyx[1:]), indexing="ij"), axis=-1
            )
            index = np.floor(own.index_zyx(grid.world_mm(voxels)) + 0.5).astype(np.int64)
            if own.planar and grid.planar:
                index[..., 0] = 0  # the thickness of a slice says nothing
            inside = ((index >= 0) & (index < np.asarray(own.shape_zyx))).all(axis=-1)
            covered = covered or bool(inside.any())
            z_own, y_own, x_own = np.moveaxis(index * inside[..., None], -1, 0)
            result[z] = (inside & held[z_own, y_own, x_own])[0]
        if not covered:
            raise VolumeError(
                f"{self.mask.path} lies wholly outside of the volume that it is a mask of ({grid}); expected one in "
                "the same world: are the two masks exchanged?"
            )
        return result

    @cached_property
    def _held(self) -> NDArray[np.bool_]:
        """The whole mask (z, y, x) in memory, a byte a voxel."""
        shape = self.mask.grid.shape_zyx
        needed, free = int(np.prod(shape)), available_bytes()
        if needed > free:
            raise VolumeError(
                f"{self.mask.path} needs {in_words(needed)} of memory as a mask, {in_words(free)} are free; give a "
                "mask on a coarser grid"
            )
        held = np.empty(shape, dtype=np.bool_)
        thick = max(1, _SLAB // max(1, shape[1] * shape[2]))
        for z in range(0, shape[0], thick):
            box = Box((z, 0, 0), (min(z + thick, shape[0]), *shape[1:]))
            values: NDArray[Any] = self.mask.read(box)[0]
            held[box.slices] = np.nan_to_num(values) != 0
        if not held.any():
            raise VolumeError(
                f"{self.mask.path} is empty: all of its voxels are 0; expected a mask that is not zero where the "
                "specimen counts"
            )
        return held
