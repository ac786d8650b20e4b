"""Chunks of a zarr array that are there as files; the others are nothing but the fill value.

Writers leave out chunks that hold only the fill value, so a real volume may store few of those that its shape has. A
copy that broke off looks the same. zarr-python asks for every chunk of a box, the missing ones too, at about 2 ms each.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_LISTED = 200_000  # files: a folder of more takes seconds to list, and is not a sparse array's
_SPARSE = (
    4  # times as many chunks as are stored: from here on, asking for each stored one by itself is quicker
)
# Every encoding of zarr's keys: 0.1.2 and 0/1/2 (version 2), c/0/1/2 and c.0.1.2 (version 3).
_KEY = re.compile(r"(?:c[./])?(\d+(?:[./]\d+)*)")

Index = tuple[int, ...]


def stored_chunks(folder: Path, num_axes: int) -> frozenset[Index] | None:
    """List the chunks of an array that are there as files.

    Parameters
    ----------
    folder : Path
        Folder of the array.
    num_axes : int
        Number of its axes.

    Returns
    -------
    set of tuple of int, or None
        Their numbers along each axis; None for an array of so many files that listing them takes long.
    """
    found = set()
    for count, name in enumerate(_names(folder)):
        if count == _MOST_LISTED:
            return None
        match = _KEY.fullmatch(name)
        numbers = tuple(map(int, re.split(r"[./]", match[1]))) if match else ()
        if len(numbers) == num_axes:
            found.add(numbers)
    return frozenset(found)


def _names(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        yield from (name if inside == "." else f"{inside}/{name}" for name in names)


@dataclass(frozen=True)
class SparseArray:
    """A zarr array of which only the chunks that are stored are asked for. It slices like numpy.

    Parameters
    ----------
    array : zarr.Array
        The array; where it is sharded, a shard counts as its chunk.
    stored : set of tuple of int
        Numbers of the chunks that are there.
    """

    array: Any
    stored: frozenset[Index]

    @property
    def num_chunks(self) -> int:
        """Number of chunks that the shape has."""
        return math.prod(-(-n // c) for n, c in zip(self.array.shape, self._chunk, strict=True))

    @property
    def num_stored(self) -> int:
        """Number of them that are there."""
        return sum(
            all(i * c < n for i, c, n in zip(index, self._chunk, self.array.shape, strict=True))
            for index in self.stored
        )

    @property
    def fill(self) -> Any:
        """Value of the voxels that are not stored. Version 2 allows to name none: zarr-python then gives 0."""
        value = self.array.fill_value
        return self.array.dtype.type(0) if value is None else value

    @property
    def _chunk(self) -> tuple[int, ...]:
        return tuple(getattr(self.array, "shards", None) or self.array.chunks)

    def __getitem__(self, index: Sequence[int | slice]) -> NDArray[Any]:
        """Read a part, as the array itself would; slices have no step."""
        bounds = [
            (i, i + 1) if isinstance(i, int) else i.indices(n)[:2]
            for i, n in zip(index, self.array.shape, strict=True)
        ]
        kept = tuple(0 if isinstance(i, int) else slice(None) for i in index)
        first = [a // c for (a, _), c in zip(bounds, self._chunk, strict=True)]
        last = [-(-b // c) for (_, b), c in zip(bounds, self._chunk, strict=True)]
        asked = math.prod(max(0, b - a) for a, b in zip(first, last, strict=True))
        wanted = list(self._among(first, last, asked))
        if len(wanted) * _SPARSE >= asked:
            return np.asarray(self.array[tuple(index)])
        out = np.full([max(0, b - a) for a, b in bounds], self.fill, self.array.dtype)
        for chunk in wanted:
            part = [
                (max(a, i * c), min(b, (i + 1) * c))
                for i, c, (a, b) in zip(chunk, self._chunk, bounds, strict=True)
            ]
            inside = tuple(slice(p - a, q - a) for (p, q), (a, _) in zip(part, bounds, strict=True))
            out[inside] = self.array[tuple(slice(p, q) for p, q in part)]
        return out[kept]

    def _among(self, first: Sequence[int], last: Sequence[int], asked: int) -> Iterator[Index]:
        """Go through the stored chunks between two numbers, by way of whichever are fewer: the stored or the asked."""
        if asked < len(self.stored):
            every = itertools.product(*map(range, first, last))
            yield from (index for index in every if index in self.stored)
        else:
            yield from (
                i for i in self.stored if all(a <= n < b for a, n, b in zip(first, i, last, strict=True))
            )


def sparse_note(name: str, array: SparseArray) -> tuple[str, ...]:
    """Note how much of what an array claims is there; nothing where all of it is."""
    stored, there = array.num_stored, array.num_chunks
    if stored >= there:
        return ()
    return (
        f"{name}: {stored} of its {there} chunks are stored; the others are read as {array.fill}, the fill value. "
        "Writers leave out chunks that hold nothing else; an incomplete copy looks the same",
    )
