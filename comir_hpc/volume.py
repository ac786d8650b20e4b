"""A volume on disk: an OME-Zarr 0.5 image (zarr v3, sharded, multiscale) whose grid knows its direction.

OME-Zarr 0.5 has no place for direction cosines, so the whole `Grid` is kept beside its metadata in the `comir`
namespace, and the standard's own transformations say what they can (scale, and translation of voxel 0). Every
volume has four axes (c, z, y, x), a single channel too.

zarr is touched in this module only; voxels pass through `shards`. Writers own whole shards: `write` refuses anything
else, because two writers in one shard lose data without a word (zarr-python 3682, dask 12583).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec

from comir_hpc import __version__
from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box, Grid, Triple, plan_blocks
from comir_hpc.pyramid import downsample as downsample  # users of volumes look for both here
from comir_hpc.pyramid import planned_levels as planned_levels
from comir_hpc.shards import Shards

AXES = ("c", "z", "y", "x")
Kind = Literal["image", "labels", "representation"]
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
_SHUFFLES: dict[Shuffle, int] = {
    "noshuffle": Blosc.NOSHUFFLE,
    "shuffle": Blosc.SHUFFLE,
    "bitshuffle": Blosc.BITSHUFFLE,
}
_CODEC: Literal["zstd"] = "zstd"
_LEVEL = 3
_ABOUT_THE_RUN = (
    "predicted",
    "needed",
    "measured",
)  # entries of the metadata that say nothing about the voxels
_WORTH_SLOWER = 0.9  # bitshuffle compresses two to four times faster than the others: they must save a tenth


@dataclass(frozen=True)
class Intensity:
    """How one channel's values become network input: clip to [low, high], subtract mean, divide by std.

    The numbers belong to the volume, never to a window: a window's own statistics would make the result depend
    on how the volume is cut. `foreground_above` separates specimen from background in the original values.
    """

    low: float
    high: float
    mean: float
    std: float
    foreground_above: float

    def normalise(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values of any shape and dtype as float32 with zero mean and unit variance over the foreground."""
        result = values.astype(np.float32)
        np.clip(result, self.low, self.high, out=result)
        result -= np.float32(self.mean)
        result /= np.float32(self.std)
        return result

    def foreground(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Where the values belong to the specimen, same shape."""
        mask: NDArray[np.bool_] = values > self.foreground_above
        return mask


class Volume:
    """One image store; make it with `create` or `open`.

    Attributes
    ----------
    path : Path
        Directory of the store.
    grid : Grid
        Where the voxels of level 0 lie.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        attributes: dict[str, Any] = dict(group.attrs)
        self.grid = Grid.from_dict(attributes["comir"]["grid"])
        self._arrays = _level_arrays(path, group, attributes)
        self._shards = [_shards(path, array) for array in self._arrays]
        self._quantised: dict[str, list[float]] | None = attributes["comir"].get("quantised")

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
        scale: Sequence[float] | None = None,
        metadata: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Volume:
        """Make an empty volume of one level, marked incomplete until `finish` is called.

        Parameters
        ----------
        dtype : dtype
            Kept as given.
        chunk, shard : int or three int
            Voxels (z, y, x) of the unit of reading and of the unit of writing; clipped to the volume.
        shuffle : str
            Filter before compression, see `best_shuffle`.
        scale : sequence of float, optional
            Of each channel: what is written are integers, what `read` gives is these times the scale, float32.
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
        _create_level(group, 0, (channels, *grid.shape_zyx), np.dtype(dtype), chunks, shards, shuffle)
        comir = {
            "grid": grid.as_dict(),
            "kind": kind,
            "shuffle": shuffle,
            "version": __version__,
            "complete": False,
        }
        if scale is not None:
            comir["quantised"] = {"scale": [float(s) for s in scale], "offset": [0.0] * channels}
        group.attrs["comir"] = {**(metadata or {}), **comir}
        group.attrs["ome"] = _ome_metadata(path.name, grid, [(1, 1, 1)], kind)
        return cls(path, group)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False, allow_incomplete: bool = False) -> Volume:
        """Open a store that `create` (or another OME-Zarr 0.5 writer, through `ingest`) made.

        Raises
        ------
        VolumeError
            If nothing is there, it is not such a store, or it was never finished.
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
        return cls(path, group)

    # ------------------------------------------------------------------ what it is

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values that `read` gives: the stored one, or float32 where integers stand for it."""
        return np.dtype(np.float32) if self._quantised else self.stored_dtype

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the values on disk, which `write` takes."""
        return np.dtype(self._arrays[0].dtype)

    @property
    def num_channels(self) -> int:
        """Length of the c axis."""
        return int(self._arrays[0].shape[0])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(c, z, y, x) of level 0."""
        return (self.num_channels, *self.grid.shape_zyx)

    @property
    def num_levels(self) -> int:
        """Levels of the pyramid, at least 1."""
        return len(self._arrays)

    @property
    def shard_zyx(self) -> Triple:
        """Voxels of one shard of level 0: the unit of writing."""
        return _zyx(self._arrays[0].shards or self._arrays[0].chunks)

    @property
    def chunk_zyx(self) -> Triple:
        """Voxels of one chunk of level 0: the unit of reading."""
        return _zyx(self._arrays[0].chunks)

    def level_factors(self, level: int) -> Triple:
        """Voxels of level 0 along z, y, x in one voxel of `level`."""
        factors = self.metadata.get("levels", [[1, 1, 1]])[level]
        return int(factors[0]), int(factors[1]), int(factors[2])

    def level_grid(self, level: int) -> Grid:
        """Grid of one level of the pyramid."""
        return self.grid.downsampled(self.level_factors(level))

    @property
    def metadata(self) -> dict[str, Any]:
        """The `comir` namespace of the store's attributes (a copy)."""
        record: Any = self._group.attrs["comir"]
        return dict(record)

    def update_metadata(self, **entries: Any) -> None:
        """Set entries of the `comir` namespace."""
        self._group.attrs["comir"] = {**self.metadata, **entries}

    @property
    def complete(self) -> bool:
        """Whether the command that writes this volume has finished."""
        return bool(self.metadata.get("complete"))

    def finish(self, **entries: Any) -> None:
        """Mark the volume complete; from now on `open` trusts it."""
        self.update_metadata(**entries, complete=True)

    def intensity(self, channel: int = 0) -> Intensity:
        """Normalisation of one channel, as `ingest` measured it.

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

    def fingerprint(self) -> str:
        """Digest that changes when the content may have changed: metadata, and every file's size and time."""
        said = {key: value for key, value in self.metadata.items() if key not in _ABOUT_THE_RUN}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for file in sorted(self.path.rglob("*")):
            if file.is_file() and file.name != "zarr.json":
                stat = file.stat()
                digest.update(f"{file.relative_to(self.path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------ voxels

    def read(self, box: Box | None = None, *, level: int = 0) -> NDArray[Any]:
        """Voxels of `box` (the whole level when none is given) as (c, z, y, x) of `dtype`.

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
        """Values as they are on disk, of `stored_dtype`; otherwise as `read`."""
        array = self._arrays[level]
        whole = Box((0, 0, 0), _zyx(array.shape))
        box = whole if box is None else box
        if not whole.contains(box) or box.size == 0:
            raise VolumeError(f"{self.path}: box {box} is not inside the volume {whole}")
        try:
            return self._shards[level].read((slice(0, self.num_channels), *box.slices))
        except (RuntimeError, ValueError, OSError) as error:
            raise VolumeError(
                f"{self.path}: box {box} cannot be read ({error}); run the command that wrote it again"
            ) from error

    def write(self, box: Box, values: NDArray[Any], *, level: int = 0) -> None:
        """Write (c, z, y, x) values of `stored_dtype` into a box that is a whole number of shards.

        Raises
        ------
        VolumeError
            If the box is not aligned to the shards, or shape or dtype differ from the volume's.
        """
        array = self._arrays[level]
        shape, shard = _zyx(array.shape), _zyx(array.shards or array.chunks)
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
        self._shards[level].write((slice(0, self.num_channels), *box.slices), values)

    def shard_files(self, box: Box, *, level: int = 0) -> Iterator[Path]:
        """Files of the shards that `box` touches, whether they exist or not (an empty shard has none)."""
        array = self._arrays[level]
        shard = _zyx(array.shards or array.chunks)
        ranges = [range(a // s, -(-b // s)) for a, b, s in zip(box.start, box.stop, shard, strict=True)]
        for c in range(self.num_channels):
            for z in ranges[0]:
                for y in ranges[1]:
                    for x in ranges[2]:
                        yield self.path / str(level) / "c" / str(c) / str(z) / str(y) / str(x)

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
        kind: Kind = self.metadata["kind"]
        shuffle: Shuffle = self.metadata.get("shuffle", "bitshuffle")
        factors = planned_levels(self.grid)
        # Until they are written again, the levels above 0 are not named: a stop in between leaves no dead links.
        self._group.attrs["ome"] = _ome_metadata(self.path.name, self.grid, factors[:1], kind)
        self.update_metadata(levels=[[1, 1, 1]])
        for level in range(1, len(factors)):
            step = _zyx([b // a for a, b in zip(factors[level - 1], factors[level], strict=True)])
            shape = self.grid.downsampled(factors[level]).shape_zyx
            chunks, shards = chunk_and_shard(shape, self.chunk_zyx, self.shard_zyx)
            name = str(level)
            if name in self._group:
                del self._group[name]
            _create_level(
                self._group, level, (self.num_channels, *shape), self.stored_dtype, chunks, shards, shuffle
            )
            self._arrays = [*self._arrays[:level], self._group[name]]  # type: ignore[list-item]
            self._shards = [*self._shards[:level], Shards(self.path / name)]
            self._fill_level(level, step, shards, kind, known=level_1 if level == 1 else None)
        self.update_metadata(levels=[list(f) for f in factors])
        self._group.attrs["ome"] = _ome_metadata(self.path.name, self.grid, factors, kind)

    def _fill_level(
        self,
        level: int,
        step: Triple,
        shards: Triple,
        kind: Kind,
        known: Callable[[Box], NDArray[Any] | None] | None,
    ) -> None:
        below = Box((0, 0, 0), _zyx(self._arrays[level - 1].shape))
        for block in plan_blocks(_zyx(self._arrays[level].shape), shards):
            values = np.empty((self.num_channels, *block.write.shape), dtype=self.stored_dtype)
            # A row of chunks at a time: the finer voxels under a whole shard are eight times as many.
            for layer in plan_blocks(block.write.shape, (*self.chunk_zyx[:2], block.write.shape[2])):
                target = layer.write.shifted(block.write.start)
                coarse = known(target) if known else None
                if coarse is not None:
                    values[(slice(None), *layer.write.slices)] = coarse
                    continue
                source = Box(
                    _zyx([a * s for a, s in zip(target.start, step, strict=True)]),
                    _zyx([b * s for b, s in zip(target.stop, step, strict=True)]),
                ).intersect(below)
                fine = self.read_stored(source, level=level - 1)
                values[(slice(None), *layer.write.slices)] = downsample(fine, step, labels=kind == "labels")
            self.write(block.write, values, level=level)


def chunk_and_shard(
    shape_zyx: Sequence[int], chunk: int | Sequence[int], shard: int | Sequence[int]
) -> tuple[Triple, Triple]:
    """Chunk and shard of a volume, clipped to it, the shard a multiple of the chunk.

    Raises
    ------
    VolumeError
        If the chunk does not divide the shard.
    """
    chunks = (chunk,) * 3 if isinstance(chunk, int) else tuple(chunk)
    shards = (shard,) * 3 if isinstance(shard, int) else tuple(shard)
    for axis, small, large in zip("zyx", chunks, shards, strict=True):
        if small < 1 or large < 1 or large % small:
            raise VolumeError(
                f"a shard of {large} voxels along {axis} is not a whole number of chunks of {small}; "
                f"use --shard {max(1, large // max(small, 1)) * max(small, 1)}"
            )
    clipped = [min(c, n) for c, n in zip(chunks, shape_zyx, strict=True)]
    whole = [c * -(-min(s, n) // c) for c, s, n in zip(clipped, shards, shape_zyx, strict=True)]
    return _zyx(clipped), _zyx(whole)


def best_shuffle(values: NDArray[Any]) -> Shuffle:
    """Filter under which a sample of a volume compresses best: bitshuffle, unless another saves a tenth of it."""
    sizes = {name: compressed_bytes(values, name) for name in _SHUFFLES}
    smallest = min(sizes, key=lambda name: sizes[name])
    return smallest if sizes[smallest] < _WORTH_SLOWER * sizes["bitshuffle"] else "bitshuffle"


def compressed_bytes(values: NDArray[Any], shuffle: Shuffle) -> int:
    """Bytes that a sample (c, z, y, x) takes when each channel is compressed as a chunk is."""
    codec = Blosc(_CODEC, _LEVEL, shuffle=_SHUFFLES[shuffle])
    return sum(len(codec.encode(np.ascontiguousarray(channel))) for channel in values)


def foreign_node(path: Path) -> Any:
    """Root of a zarr store of any format and origin, for the readers: a group or an array."""
    return zarr.open(store=str(path), mode="r")


def foreign_arrays(node: Any) -> Iterator[tuple[str, Any]]:
    """Every array in a zarr store with its path; a root that is an array has the path ``""``."""
    if isinstance(node, zarr.Array):
        yield "", node
        return
    for name, member in node.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield name, member


def _zyx(values: Sequence[int]) -> Triple:
    z, y, x = values[-3:]
    return int(z), int(y), int(x)


def _create_level(
    group: zarr.Group,
    level: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: Triple,
    shards: Triple,
    shuffle: Shuffle,
) -> None:
    group.create_array(
        str(level),
        shape=shape,
        dtype=dtype,
        chunks=(1, *chunks),
        shards=(1, *shards),
        compressors=BloscCodec(cname=_CODEC, clevel=_LEVEL, shuffle=shuffle),
        fill_value=0,
        dimension_names=AXES,
    )


def _level_arrays(path: Path, group: zarr.Group, attributes: dict[str, Any]) -> list[zarr.Array[Any]]:
    datasets = attributes["ome"]["multiscales"][0]["datasets"]
    try:
        arrays = [group.get(dataset["path"]) for dataset in datasets]
    except ValueError as error:  # zarr refuses "." and ".." within a path
        raise VolumeError(
            f"{path}: a level of the pyramid lies outside of the store; run the command that wrote it again"
        ) from error
    if not all(isinstance(a, zarr.Array) for a in arrays):
        raise VolumeError(f"{path}: a level of the pyramid is missing; run the command that wrote it again")
    return arrays  # type: ignore[return-value]


def _shards(path: Path, array: zarr.Array[Any]) -> Shards:
    return Shards(path / array.path)


def _ome_metadata(name: str, grid: Grid, factors: Sequence[Triple], kind: Kind) -> dict[str, Any]:
    """Multiscale metadata of OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5).

    The standard's translation has the order and axes of the array: the origin seen along the array's own axes.
    """
    direction = np.asarray(grid.direction)
    datasets = []
    for level, factor in enumerate(factors):
        coarse = grid.downsampled(factor)
        along_axes = (direction.T @ np.asarray(coarse.origin_xyz))[::-1]
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, *coarse.spacing_zyx]},
                    {"type": "translation", "translation": [0.0, *along_axes.tolist()]},
                ],
            }
        )
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": grid.unit} for a in "zyx"]
    method = "mode over 2x2x2" if kind == "labels" else "mean over 2x2x2"
    multiscale = {"name": name, "axes": axes, "datasets": datasets, "type": method}
    return {"version": "0.5", "multiscales": [multiscale]}
