"""How an array is laid out on disk: chunks, shards, filter, compression and checksums.

Each chunk is compressed by blosc. On request it is followed by a checksum of what was stored (zarr's codec ``crc32c``).
The index of every shard always has one. Whichever bit of a file flips then, reading it is an error. What that costs,
and why it is not done unasked, is in docs/volumes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from comir_hpc.errors import VolumeError

if TYPE_CHECKING:
    from comir_hpc.space.grid import Triple

AXES = ("c", "z", "y", "x")
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
_SHUFFLES: dict[Shuffle, int] = {
    "noshuffle": Blosc.NOSHUFFLE,
    "shuffle": Blosc.SHUFFLE,
    "bitshuffle": Blosc.BITSHUFFLE,
}
_CODEC: Literal["zstd"] = "zstd"
_LEVEL = 3
_WORTH_SLOWER = 0.9  # bitshuffle compresses two to four times faster than the others: they must save a tenth


def chunk_and_shard(
    shape_zyx: Sequence[int], chunk: int | Sequence[int], shard: int | Sequence[int]
) -> tuple[Triple, Triple]:
    """Return the chunk and the shard of a volume, both clipped to it; the shard is a multiple of the chunk.

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
    # The last chunk of a shard may reach beyond the volume: zarr wants whole chunks in a shard, and stores nothing
    # there.
    clipped = [min(c, n) for c, n in zip(chunks, shape_zyx, strict=True)]
    whole = [c * -(-min(s, n) // c) for c, s, n in zip(clipped, shards, shape_zyx, strict=True)]
    return as_zyx(clipped), as_zyx(whole)


def best_shuffle(values: NDArray[Any]) -> Shuffle:
    """Return the filter under which a sample of a volume compresses best.

    This is bitshuffle, unless another filter saves a tenth of it.
    """
    sizes = {name: compressed_bytes(values, name) for name in _SHUFFLES}
    smallest = min(sizes, key=lambda name: sizes[name])
    return smallest if sizes[smallest] < _WORTH_SLOWER * sizes["bitshuffle"] else "bitshuffle"


def compressed_bytes(values: NDArray[Any], shuffle: Shuffle) -> int:
    """Return the bytes that a sample (c, z, y, x) takes when each channel is compressed as a chunk is."""
    codec = Blosc(_CODEC, _LEVEL, shuffle=_SHUFFLES[shuffle])
    return sum(len(codec.encode(np.ascontiguousarray(channel))) for channel in values)


def create_level(
    group: zarr.Group,
    level: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: Triple,
    shards: Triple,
    shuffle: Shuffle,
    checksums: bool,
) -> None:
    """Make an empty array of one pyramid level in a zarr group.

    Parameters
    ----------
    group : zarr.Group
        Open root group of the store, in which the array is made.
    level : int
        Level of the pyramid, which is the array's name.
    shape : four int
        Voxels of the level along c, z, y, x.
    dtype : dtype
        Type of the values as they are stored.
    chunks, shards : three int
        Voxels (z, y, x) of one chunk and of one shard; both hold one channel.
    shuffle : str
        Filter before compression, as `best_shuffle` chooses it.
    checksums : bool
        Whether every chunk is followed by a checksum.
    """
    codecs: list[Any] = [BloscCodec(cname=_CODEC, clevel=_LEVEL, shuffle=shuffle)]
    group.create_array(
        str(level),
        shape=shape,
        dtype=dtype,
        # One channel a chunk: whoever wants one of many decompresses no other.
        chunks=(1, *chunks),
        shards=(1, *shards),
        compressors=[*codecs, Crc32cCodec()] if checksums else codecs,
        # Chunks of nothing but this value are not stored: the air around a specimen takes no disk.
        fill_value=0,
        dimension_names=AXES,
    )


def as_zyx(values: Sequence[int]) -> Triple:
    """Take the last three of (z, y, x) or (c, z, y, x) values."""
    z, y, x = values[-3:]
    return int(z), int(y), int(x)
