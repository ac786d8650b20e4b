"""A volume on disk: an OME-Zarr 0.5 image (zarr v3, sharded, multiscale) whose grid knows its direction.

OME-Zarr 0.5 has no place for direction cosines. So the whole `Grid` is kept beside its metadata, in the `comir`
namespace. The standard's own transformations say what they can: scale, and translation of voxel 0. Every volume has
four axes (c, z, y, x), a single channel too.

Writers own whole shards: `write` refuses anything else, because two writers in one shard lose data without a word
(zarr-python 3682, dask 12583). A finished volume knows its files (`inventory`), so that a lost one is not read as
zeros.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray

from comir_hpc import __version__
from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Grid, Triple
from comir_hpc.space.plan import plan_blocks
from comir_hpc.volumes.chunks import AXES as AXES  # users of volumes look for all of these here
from comir_hpc.volumes.chunks import Shuffle as Shuffle
from comir_hpc.volumes.chunks import as_zyx, create_level
from comir_hpc.volumes.chunks import best_shuffle as best_shuffle
from comir_hpc.volumes.chunks import chunk_and_shard as chunk_and_shard
from comir_hpc.volumes.chunks import compressed_bytes as compressed_bytes
from comir_hpc.volumes.intensity import Intensity as Intensity
from comir_hpc.volumes.inventory import shard_path, shards_of
from comir_hpc.volumes.ome import Kind as Kind
from comir_hpc.volumes.ome import foreign_arrays as foreign_arrays
from comir_hpc.volumes.ome import foreign_node as foreign_node
from comir_hpc.volumes.ome import ome_metadata
from comir_hpc.volumes.pyramid import downsample as downsample
from comir_hpc.volumes.pyramid import planned_levels as planned_levels
from comir_hpc.volumes.shards import Shards, cause_of
from comir_hpc.volumes.store import Store, array_of


class Volume(Store):
    """One image store; make it with `create` or `open`.

    Attributes
    ----------
    path : Path
        Folder of the store.
    grid : Grid
        Grid of level 0: where its voxels lie.
    """

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        grid: Grid,
        dtype: DTypeLike,
        *,
        channels: int = 1,
        kind: Kind = "image",
        chunk: int | Sequence[int] = 64,
        shard: int | Sequence[int] = 256,
        shuffle: Shuffle = "bitshuffle",
        checksums: bool = False,
        scale: Sequence[float] | None = None,
        metadata: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Volume:
        """Make an empty volume of one level, marked incomplete until `finish` is called.

        Parameters
        ----------
        dtype : dtype
            Type of the values on disk, kept as given.
        chunk, shard : int or three int
            Voxels (z, y, x) of the unit of reading and of the unit of writing; clipped to the volume.
        shuffle : str
            Filter before compression, see `best_shuffle`.
        checksums : bool
            Follow every chunk with a checksum, so that a flipped bit is an error when it is read (`chunks`).
        scale : sequence of float, optional
            Scale of each channel. Integers are written, and `read` gives them times the scale, as float32.
        metadata : dict, optional
            Further entries of the `comir` namespace, JSON-ready.
        overwrite : bool
            Whether a store that exists at `path` is deleted first.

        Raises
        ------
        VolumeError
            If something exists at `path` and `overwrite` is not set, or the chunk does not divide the shard.
        """
        path = Path(path)
        if path.exists():
            if not overwrite:
                raise VolumeError(f"{path} exists; choose another name or pass --overwrite")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        chunks, shards = chunk_and_shard(grid.shape_zyx, chunk, shard)
        group = zarr.create_group(store=str(path), zarr_format=3)
        shape = (channels, *grid.shape_zyx)
        create_level(group, 0, shape, np.dtype(dtype), chunks, shards, shuffle, checksums)
        comir = {
            "grid": grid.as_dict(),
            "kind": kind,
            "shuffle": shuffle,
            "version": __version__,
            "complete": False,
        }
        if checksums:
            comir["checksums"] = True
        if scale is not None:
            comir["quantised"] = {"scale": [float(s) for s in scale], "offset": [0.0] * channels}
        group.attrs["comir"] = {**(metadata or {}), **comir}
        group.attrs["ome"] = ome_metadata(path.name, grid, [(1, 1, 1)], kind)
        return cls(path, group)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False, allow_incomplete: bool = False) -> Volume:
        """Open a store that `create` (or another OME-Zarr 0.5 writer, through `ingest`) made.

        The files of a finished store are looked at, those of a large one when they are first read from (`inventory`).

        Raises
        ------
        VolumeError
            If nothing is there, it is not such a store, it was never finished, or files of it are missing or of
            another size than they were.
        """
        path = Path(path)
        if not path.exists():
            raise VolumeError(f"{path} does not exist; expected an OME-Zarr store made by `comir-hpc ingest`")
        try:
            group = zarr.open_group(store=str(path), mode="r+" if writable else "r", zarr_format=3)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise VolumeError(
                f"{path} is not a zarr v3 group ({error}); run `comir-hpc ingest` on it first"
            ) from error
        comir = group.attrs.get("comir")
        if not isinstance(comir, dict) or "grid" not in comir:
            raise VolumeError(
                f"{path} was not made by comir-hpc: no grid in it; run `comir-hpc ingest {path} OUT.zarr` first"
            )
        if not comir.get("complete") and not (allow_incomplete or writable):
            raise VolumeError(
                f"{path} is incomplete: the command that writes it was stopped; run that command again"
            )
        volume = cls(path, group, lenient=allow_incomplete or writable)
        if not (allow_incomplete or writable):
            volume._require_files()
        return volume

    # ------------------------------------------------------------------ what it is

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values that `read` gives: the stored one, or float32 where integers stand for it."""
        return np.dtype(np.float32) if self._quantised else self.stored_dtype

    def intensity(self, channel: int = 0) -> Intensity:
        """Return the normalisation of one channel, as `ingest` measured it.

        Raises
        ------
        VolumeError
            If the store has no statistics.
        """
        statistics = self.metadata.get("intensity")
        if not statistics:
            raise VolumeError(
                f"{self.path} has no intensity statistics; run `comir-hpc ingest {self.path} OUT.zarr`"
            )
        return Intensity(**statistics[channel])

    # ------------------------------------------------------------------ voxels

    def read(self, box: Box | None = None, *, level: int = 0) -> NDArray[Any]:
        """Read `box` (the whole level when none is given) as (c, z, y, x) of `dtype`.

        Raises
        ------
        VolumeError
            If the box leaves the volume, or a shard of it is damaged.
        """
        values = self.read_stored(box, level=level)
        if self._quantised is None:
            return values
        result = values.astype(np.float32)
        for channel, scale, offset in zip(
            result, self._quantised["scale"], self._quantised["offset"], strict=True
        ):
            channel *= np.float32(scale)
            channel += np.float32(offset)
        return result

    def read_stored(self, box: Box | None = None, *, level: int = 0) -> NDArray[Any]:
        """Read the values as they are on disk, of `stored_dtype`; otherwise as `read`."""
        array = self._arrays[level]
        whole = Box((0, 0, 0), as_zyx(array.shape))
        box = whole if box is None else box
        if not whole.contains(box) or box.size == 0:
            raise VolumeError(f"{self.path}: box {box} is not inside the volume {whole}")
        if self._unseen is not None:
            places = shards_of(box, self._shard_zyx(level))
            self._refuse(self._unseen.damage_in(level, self.num_channels, places), self._unseen.num_files)
        try:
            return self._shards[level].read((slice(0, self.num_channels), *box.slices))
        except (RuntimeError, ValueError, OSError) as error:
            raise VolumeError(
                f"{self.path}: box {box} cannot be read{self._unreadable(level, box)} ({cause_of(error)}); "
                f"{self.repair(content=True)}"
            ) from error

    def _unreadable(self, level: int, box: Box) -> str:
        """Say which shard of a box that cannot be read is the first that is damaged."""
        shard = self._shard_zyx(level)
        for c, z, y, x in product(range(self.num_channels), *shards_of(box, shard)):
            start = (z * shard[0], y * shard[1], x * shard[2])
            part = Box(start, as_zyx([a + s for a, s in zip(start, shard, strict=True)])).intersect(box)
            try:
                self._shards[level].read((slice(c, c + 1), *part.slices))
            except (RuntimeError, ValueError, OSError):
                return f": {shard_path(self.path, level, (c, z, y, x)).relative_to(self.path)} is damaged, box {part}"
        return ""

    def write(self, box: Box, values: NDArray[Any], *, level: int = 0) -> None:
        """Write (c, z, y, x) values of `stored_dtype` into a box that is a whole number of shards.

        Raises
        ------
        VolumeError
            If the box is not aligned to the shards, or shape or dtype differ from the volume's.
        """
        shape, shard = as_zyx(self._arrays[level].shape), self._shard_zyx(level)
        for axis, start, stop, one, size in zip("zyx", box.start, box.stop, shard, shape, strict=True):
            if start % one or not (stop == size or (stop % one == 0 and stop < size)) or stop <= start:
                raise VolumeError(
                    f"{self.path}: box {box} is not a whole number of shards along {axis} "
                    f"(shard {one}, volume {size}); plan it with plan_blocks"
                )
        if values.shape != (self.num_channels, *box.shape):
            raise VolumeError(
                f"{self.path}: values of shape {values.shape}, expected {(self.num_channels, *box.shape)} (c, z, y, x)"
            )
        if values.dtype != self.stored_dtype:
            raise VolumeError(
                f"{self.path}: values are {values.dtype}, the volume is {self.stored_dtype}; convert them first"
            )
        # Before the first byte changes: a crash then leaves a volume that says that it is incomplete.
        if self._complete:
            self.withdraw()
        self._shards[level].write((slice(0, self.num_channels), *box.slices), values)

    # ------------------------------------------------------------------ pyramid

    def build_pyramid(self, level_1: Callable[[Box], NDArray[Any] | None] | None = None) -> None:
        """Write every level above 0 from the level below it, one slab of shards at a time.

        Images are averaged over 2 x 2 x 2 voxels (a box filter centred on the coarse voxel, so nothing moves);
        labels take the most frequent value.

        Parameters
        ----------
        level_1 : callable, optional
            Gives voxels (c, z, y, x) of a box of level 1 where they are known already, else None.
        """
        self.unname_levels()
        for level in range(1, len(planned_levels(self.grid))):
            self.add_level(level)
            for box in self.level_shards(level):
                self.fill_shard(level, box, known=level_1 if level == 1 else None)
        self.name_levels()

    def unname_levels(self) -> None:
        """Name level 0 only: a stop before the others are written again leaves no dead links."""
        self._name_levels(planned_levels(self.grid)[:1])
        self._arrays, self._shards = self._arrays[:1], self._shards[:1]

    def name_levels(self) -> None:
        """Name all levels, which are written."""
        self._name_levels(planned_levels(self.grid))

    def _name_levels(self, factors: Sequence[Triple]) -> None:
        ome = ome_metadata(self.path.name, self.grid, factors, self.metadata["kind"])
        self.withdraw(ome, levels=[list(f) for f in factors])

    def add_level(self, level: int, *, keep: bool = False) -> bool:
        """Take up the level after the last one, empty, or as it is on disk; whether it was there and is kept.

        Parameters
        ----------
        keep : bool
            Keep what is there, if it is an array of the shape that the level should have.
        """
        shape = (self.num_channels, *self.grid.downsampled(planned_levels(self.grid)[level]).shape_zyx)
        chunks, shards = chunk_and_shard(shape[1:], self.chunk_zyx, self.shard_zyx)
        there = array_of(self._group, str(level))
        kept = keep and there is not None and there.shape == shape and there.shards == (1, *shards)
        if not kept:
            if (self.path / str(level)).exists():
                shutil.rmtree(self.path / str(level))
            how: tuple[Shuffle, bool] = (
                self.metadata.get("shuffle", "bitshuffle"),
                "checksums" in self.metadata,
            )
            create_level(self._group, level, shape, self.stored_dtype, chunks, shards, *how)
            there = array_of(self._group, str(level))
        assert there is not None
        self._arrays = [*self._arrays[:level], there]
        self._shards = [*self._shards[:level], Shards(self.path / str(level))]
        return kept

    def level_shards(self, level: int) -> Iterator[Box]:
        """Yield the boxes of the shards of a level, each of all channels."""
        for block in plan_blocks(as_zyx(self._arrays[level].shape), self._shard_zyx(level)):
            yield block.write

    def fill_shard(
        self, level: int, box: Box, *, known: Callable[[Box], NDArray[Any] | None] | None = None
    ) -> None:
        """Write one shard of a level from the level below.

        Parameters
        ----------
        box : Box
            Voxels of one shard, from `level_shards`.
        known : callable, optional
            Gives voxels (c, z, y, x) of a box of the level where they are known already, else None.
        """
        factors = planned_levels(self.grid)
        step = as_zyx([b // a for a, b in zip(factors[level - 1], factors[level], strict=True)])
        below = Box((0, 0, 0), as_zyx(self._arrays[level - 1].shape))
        values = np.empty((self.num_channels, *box.shape), dtype=self.stored_dtype)
        # A row of chunks at a time: the finer voxels under a whole shard are eight times as many.
        for layer in plan_blocks(box.shape, (*self.chunk_zyx[:2], box.shape[2])):
            target = layer.write.shifted(box.start)
            coarse = known(target) if known else None
            if coarse is None:
                ends = ([a * s for a, s in zip(e, step, strict=True)] for e in (target.start, target.stop))
                source = Box(*map(as_zyx, ends)).intersect(below)
                fine = self.read_stored(source, level=level - 1)
                coarse = downsample(fine, step, labels=self.metadata["kind"] == "labels")
            values[(slice(None), *layer.write.slices)] = coarse
        self.write(box, values, level=level)
