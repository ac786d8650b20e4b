"""Voxels that lie in a file as they are: where, how many, and the bytes of one box."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import in_words
from comir_hpc.space.grid import Box


def cut(array: Any, axes: str, box: Box) -> NDArray[Any]:
    """Read `box` out of anything that slices like numpy and has axes named in `axes`, as (c, z, y, x).

    An axis ``1`` is taken at its only index; an array without ``z`` is a single slice.
    """
    where = dict(zip("zyx", box.slices, strict=True))
    index = tuple(0 if a == "1" else where.get(a, slice(None)) for a in axes)
    values: NDArray[Any] = np.asarray(array[index])
    kept = axes.replace("1", "")
    for axis in "zc":
        if axis not in kept:
            values, kept = values[None], axis + kept
    return values.transpose([kept.index(a) for a in "czyx"])


def shape_of(shape: Sequence[int], axes: str) -> tuple[int, int, int, int]:
    """Return the shape (c, z, y, x) of an array with these axes."""
    sizes = {"c": 1, "z": 1, **dict(zip(axes, shape, strict=True))}
    return sizes["c"], sizes["z"], sizes["y"], sizes["x"]


@dataclass(frozen=True)
class RawLayout:
    """Uncompressed voxels in a file: C order from `offset`, with axes as in `cut`."""

    file: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axes: str

    @property
    def num_bytes(self) -> int:
        """Length in bytes of the voxels in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_length(self, path: Path) -> None:
        """Refuse a file that ends before its voxels do.

        Raises
        ------
        VolumeError
            If the file is missing or too short; the message has both lengths in bytes.
        """
        if not self.file.is_file():
            raise VolumeError(f"{path} says its voxels are in {self.file}, which does not exist")
        self.check_possible(path)
        found, expected = self.file.stat().st_size, self.offset + self.num_bytes
        if found < expected:
            raise VolumeError(
                f"{self.file} is truncated: {found} bytes ({in_words(found)}), expected {expected} for "
                f"{self.shape} voxels of {self.dtype}; copy or export it again"
            )

    def check_possible(self, path: Path) -> None:
        """Refuse sizes that no file has.

        Raises
        ------
        VolumeError
            If the shape or the offset is impossible; the message has what the header of `path` says.
        """
        if self.offset < 0 or min(self.shape) < 1:
            raise VolumeError(
                f"{path}: {self.shape} voxels from byte {self.offset} of {self.file.name} on cannot be; the header is "
                "damaged: export it again"
            )

    def trailing(self, path: Path) -> tuple[str, ...]:
        """Note bytes behind the last voxel, which nobody reads."""
        more = self.file.stat().st_size - self.offset - self.num_bytes
        if more <= 0:
            return ()
        return (
            f"{path.name}: {more} bytes follow the {self.num_bytes} of its voxels in {self.file.name} and are not read",
        )

    def read(self, box: Box) -> NDArray[Any]:
        """Read the voxels of `box` as (c, z, y, x).

        Rows are read, not mapped: a map counts every page around a touched one as this process's memory.
        """
        if "z" not in self.axes:
            return replace(self, shape=(1, *self.shape), axes="z" + self.axes).read(box)
        if "yx" not in self.axes:
            # Rows do not lie side by side here. The copy lets go of the map, and so of the file.
            return cut(self._mapped(), self.axes, box).copy()
        split = self.axes.index("y")
        ranges = [
            range(box.start[0], box.stop[0]) if a == "z" else range(n)
            for a, n in zip(self.axes, self.shape, strict=True)
        ]
        leading, counts = ranges[:split], self.shape[:split]
        # Whole rows, whose columns are cut afterwards: one call for all rows of a plane, instead of one for each row.
        rows = np.empty((box.shape[1], *self.shape[split + 1 :]), dtype=self.dtype)
        out = np.empty((*map(len, leading), *box.shape[1:], *self.shape[split + 2 :]), dtype=self.dtype)
        plane = math.prod(self.shape[split:]) * self.dtype.itemsize
        start = self.offset + box.start[1] * rows[:1].nbytes
        with self.file.open("rb", buffering=0) as file:
            for place in np.ndindex(*out.shape[:split]):
                number = int(
                    np.ravel_multi_index([r[p] for r, p in zip(leading, place, strict=True)], counts)
                )
                _fill(file.fileno(), rows, start + number * plane)
                out[place] = rows[:, box.start[2] : box.stop[2]]
        return cut(out, self.axes, Box((0, 0, 0), box.shape))

    def _mapped(self) -> NDArray[Any]:
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


def _fill(descriptor: int, rows: NDArray[Any], offset: int) -> None:
    """Read into a contiguous array; one call may give less than was asked for."""
    buffer = memoryview(rows.reshape(-1).view(np.uint8).data)
    done = 0
    while done < len(buffer):
        step = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not step:
            raise EOFError(f"the file ends at byte {offset + done}, {len(buffer) - done} bytes too early")
        done += step
