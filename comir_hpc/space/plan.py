"""Cut a volume into blocks on the grid of its shards. Pure integers: nothing is read or written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from comir_hpc.errors import ConfigError
from comir_hpc.space.grid import Box, Triple, as_triple


@dataclass(frozen=True)
class Block:
    """One unit of work: its number, the box that it writes, on the shard grid, and the box that it may read."""

    index: int
    write: Box
    read: Box


@dataclass(frozen=True)
class BlockPlan(Sequence[Block]):
    """Every block of a volume by number. A block is made when it is asked for: a plan of a million costs nothing."""

    shape_zyx: Triple
    core_zyx: Triple
    halo_zyx: Triple

    @property
    def counts_zyx(self) -> Triple:
        """Number of blocks along z, y, x."""
        z, y, x = (-(-n // c) for n, c in zip(self.shape_zyx, self.core_zyx, strict=True))
        return z, y, x

    @property
    def largest_two(self) -> tuple[int, int]:
        """Numbers of voxels that the two largest blocks write; 0 where there is no second one."""
        whole = [min(c, n) for c, n in zip(self.core_zyx, self.shape_zyx, strict=True)]
        largest = math.prod(whole)
        if math.prod(n // w for n, w in zip(self.shape_zyx, whole, strict=True)) > 1:
            return largest, largest
        # A single block is whole along every axis, so the next in size is cut along one of them.
        return largest, max(largest // w * (n % w) for n, w in zip(self.shape_zyx, whole, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts_zyx)

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        place = np.unravel_index(index, self.counts_zyx)
        whole = Box((0, 0, 0), self.shape_zyx)
        start = as_triple([int(p) * c for p, c in zip(place, self.core_zyx, strict=True)], int)
        core = Box(start, as_triple([s + c for s, c in zip(start, self.core_zyx, strict=True)], int))
        write = core.intersect(whole)
        # The halo ends with the volume and is not padded: whoever reads decides what lies beyond.
        return Block(index, write, write.grown(self.halo_zyx).intersect(whole))

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def part(self, number: int, parts: int) -> range:
        """Return the block numbers of part `number` of `parts` (from 1).

        They follow each other, and parts differ by at most one block.
        """
        if not 1 <= number <= parts:
            raise ConfigError(f"part {number}/{parts} does not exist; expected 1/{parts} to {parts}/{parts}")
        # Cuts of one line in whole numbers: neighbours meet exactly for any `parts`. A part is one run of blocks, so
        # that a sweep through it can use again what neighbouring blocks share.
        return range(len(self) * (number - 1) // parts, len(self) * number // parts)


def plan_blocks(
    shape_zyx: Sequence[int],
    shard_zyx: Sequence[int],
    *,
    core_zyx: Sequence[int] | None = None,
    halo_zyx: Sequence[int] = (0, 0, 0),
) -> BlockPlan:
    """Split a volume into blocks whose written boxes tile it and lie on the shard grid.

    A shard that two writers touch loses data without a word (zarr-python 3682). So the box that a block writes is a
    whole number of shards, except at the volume's end.

    Parameters
    ----------
    shape_zyx, shard_zyx : three int
        Voxels of the volume and of one shard.
    core_zyx : three int, optional
        Voxels that one block writes, multiples of the shard; one shard when not given.
    halo_zyx : three int
        Voxels beyond the core that a block may read on each side.

    Raises
    ------
    ConfigError
        If the core is not a multiple of the shard along an axis that has more than one block.
    """
    shape, shard = as_triple(shape_zyx, int), as_triple(shard_zyx, int)
    core = shard if core_zyx is None else as_triple(core_zyx, int)
    for axis, size, one, whole in zip("zyx", core, shard, shape, strict=True):
        # A single block along an axis meets no other one there, so it may end anywhere.
        if size < 1 or (size % one and size < whole):
            raise ConfigError(
                f"core of {size} voxels along {axis} is not a multiple of the shard ({one}): two blocks would "
                f"write one shard. Use {max(one, size // one * one)} or another multiple of {one}"
            )
    return BlockPlan(shape, core, as_triple(halo_zyx, int))
