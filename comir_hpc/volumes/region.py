"""A mask that restricts where a specimen counts: a volume on any grid, looked up at its nearest voxel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import Box, Grid

if TYPE_CHECKING:
    from comir_hpc.volumes.readers.source import Source

_SLAB = 1 << 24  # voxels of the mask that are read at once


@dataclass(frozen=True, eq=False)
class Region:
    """Where a specimen counts.

    It lies on its own grid and not on that of the volume, so that one mask serves every level and every working grid.

    Attributes
    ----------
    path : Path
        File or store of the mask.
    grid : Grid
        Where the voxels of the mask lie.
    inside : (z, y, x) bool
        Mask: what is not zero (and not NaN) counts.
    """

    path: Path
    grid: Grid
    inside: NDArray[np.bool_]

    @classmethod
    def open(cls, path: Path) -> Region:
        """Read a mask of any format that ingest reads; it is in memory with a byte a voxel.

        Raises
        ------
        VolumeError
            If it cannot be read, has several channels or no voxel that is not zero, or does not fit into memory.
        """
        # Here, since the readers of all formats take a while to load.
        from comir_hpc.volumes.readers import open_source

        source = open_source(path)
        if source.num_channels != 1:
            raise VolumeError(
                f"{path} has {source.num_channels} channels; expected a mask of one, not zero where the specimen counts"
            )
        inside = _read(source)
        if not inside.any():
            raise VolumeError(
                f"{path} is empty: all of its voxels are 0; expected a mask that is not zero where the specimen counts"
            )
        return cls(path, source.grid(), inside)

    @property
    def fingerprint(self) -> str:
        """Digest of grid and voxels."""
        content = repr(sorted(self.grid.as_dict().items())).encode() + np.packbits(self.inside).tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def on(self, grid: Grid) -> NDArray[np.bool_]:
        """Return the mask (z, y, x) on a grid: that of the nearest voxel, and False outside of the mask's own grid.

        Raises
        ------
        VolumeError
            If the mask lies wholly outside of the grid.
        """
        own, covered = self.grid, False
        result = np.zeros(grid.shape_zyx, dtype=np.bool_)
        for z in range(grid.shape_zyx[0]):
            voxels = np.stack(
                np.meshgrid([z], *(np.arange(n) for n in grid.shape_zyx[1:]), indexing="ij"), axis=-1
            )
            index = np.floor(own.index_zyx(grid.world_mm(voxels)) + 0.5).astype(np.int64)
            if own.planar and grid.planar:
                index[..., 0] = 0  # the thickness of a slice says nothing
            there: NDArray[np.bool_] = np.all((index >= 0) & (index < np.asarray(own.shape_zyx)), axis=-1)
            covered = covered or bool(there.any())
            z_own, y_own, x_own = np.moveaxis(index * there[..., None], -1, 0)
            result[z] = (there & self.inside[z_own, y_own, x_own])[0]
        if not covered:
            raise VolumeError(
                f"{self.path} lies wholly outside of the volume that it is a mask of ({grid}); expected one in the "
                "same world: are the two masks exchanged?"
            )
        return result


def _read(source: Source) -> NDArray[np.bool_]:
    shape = source.shape_zyx
    needed, free = int(np.prod(shape)) + source.load_bytes, available_bytes()
    if needed > free:
        raise VolumeError(
            f"{source.path} needs {in_words(needed)} of memory as a mask, {in_words(free)} are free; give a mask on a "
            "coarser grid"
        )
    inside = np.empty(shape, dtype=np.bool_)
    thick = max(1, _SLAB // max(1, shape[1] * shape[2]))
    for z in range(0, shape[0], thick):
        box = Box((z, 0, 0), (min(z + thick, shape[0]), *shape[1:]))
        values: NDArray[Any] = source.read(box)[0]
        inside[box.slices] = np.nan_to_num(values) != 0
    return inside
