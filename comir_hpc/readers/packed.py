"""Voxels inside a compressed stream: what a file of some length can hold at most, and unpacking it to the end."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box
from comir_hpc.memory import in_words
from comir_hpc.readers.raw import RawLayout, cut
from comir_hpc.readers.source import reading

DEFLATE_GAIN = 1032
"""Bytes that one byte of a deflate stream (gzip, zlib, PNG) can stand for at most: 258 for two bits."""

_STEP = 1 << 24


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip streams do, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """A file opened for reading, unpacked where it is gzip."""
    return cast(BinaryIO, gzip.open(path)) if is_gzip(path) else path.open("rb")


def require_possible(path: Path, num_bytes: int, gain: int = DEFLATE_GAIN) -> None:
    """Refuse a header that claims more than its file can hold, before memory is taken for it.

    Parameters
    ----------
    num_bytes : int
        Bytes that the file should unpack to.
    gain : int
        Bytes that one byte of the file can stand for at most.

    Raises
    ------
    VolumeError
        With both lengths.
    """
    found = path.stat().st_size
    if num_bytes > found * gain:
        raise VolumeError(
            f"{path}: its header claims {num_bytes} bytes of voxels ({in_words(num_bytes)}); a file of {found} bytes "
            f"({in_words(found)}) holds at most {in_words(found * gain)}: it is truncated or its header is damaged"
        )


def gunzip(layout: RawLayout) -> NDArray[Any]:
    """Unpack straight into the array: one copy of the volume in memory, no more.

    The stream is read to its end, since its checksum stands there.

    Raises
    ------
    VolumeError
        If the stream is damaged, ends too early, or is followed by something else.
    """
    values = np.empty(layout.shape, dtype=layout.dtype)
    buffer = memoryview(values.reshape(-1).view(np.uint8).data)
    with reading(layout.file, "gzip-compressed voxels"), gzip.open(layout.file) as file:
        skipped = file.seek(layout.offset)
        if skipped < layout.offset:
            raise EOFError(f"{skipped} bytes, expected voxels from byte {layout.offset} on")
        done = 0
        while done < len(buffer):
            step = file.readinto(buffer[done : done + _STEP])
            if not step:
                raise EOFError(f"{done} bytes of voxels, expected {len(buffer)}")
            done += step
        while file.read(_STEP):
            pass
    return values


def gunzip_or_read(
    path: Path, layout: RawLayout
) -> tuple[Callable[[Box], NDArray[Any]], int, tuple[str, ...]]:
    """How the voxels of a layout are read, packed by gzip or not; the memory that it holds; and notes.

    Parameters
    ----------
    path : Path
        The header's, for errors and notes.

    Raises
    ------
    VolumeError
        If the file cannot hold so many voxels.
    """
    if not is_gzip(layout.file):
        layout.check_length(path)
        return layout.read, 0, layout.trailing(path)
    layout.check_possible(path)
    require_possible(layout.file, layout.offset + layout.num_bytes)

    @lru_cache(maxsize=1)
    def unpacked() -> NDArray[Any]:
        return gunzip(layout)

    return (lambda box: cut(unpacked(), layout.axes, box)), layout.num_bytes, ()
