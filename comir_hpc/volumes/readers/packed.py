"""Voxels inside a compressed stream: what a file of some length can hold at most, and unpacking it to the end."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import in_words
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers.raw import RawLayout, cut
from comir_hpc.volumes.readers.source import reading

DEFLATE_GAIN = 1032
"""Bytes that one byte of a deflate stream (gzip, zlib, PNG) can stand for at most: 258 for two bits."""

Form = Literal["gzip", "zlib"]
_STEP = 1 << 20  # more costs memory and no less time


def is_gzip(path: Path) -> bool:
    """Return whether a file begins as gzip streams do, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked where it is gzip."""
    return cast(BinaryIO, gzip.open(path)) if is_gzip(path) else path.open("rb")


def require_possible(path: Path, num_bytes: int, gain: int = DEFLATE_GAIN) -> None:
    """Refuse a header that claims more than its file can hold, before memory is taken for it.

    Parameters
    ----------
    num_bytes : int
        Length in bytes that the file should unpack to.
    gain : int
        Bytes that one byte of the file can stand for at most.

    Raises
    ------
    VolumeError
        If the file is too short; the message has both lengths.
    """
    found = path.stat().st_size
    if num_bytes > found * gain:
        raise VolumeError(
            f"{path}: its header claims {num_bytes} bytes of voxels ({in_words(num_bytes)}); a file of {found} bytes "
            f"({in_words(found)}) holds at most {in_words(found * gain)}: it is truncated or its header is damaged"
        )


def unpack(layout: RawLayout, form: Form = "gzip", start: int = 0) -> NDArray[Any]:
    """Unpack straight into the array: one copy of the volume in memory, no more.

    The stream is read to its end, since its checksum stands there.

    Parameters
    ----------
    layout : RawLayout
        Layout of the voxels in what the stream unpacks to.
    form : str
        ``gzip``, or ``zlib`` (of which either header is taken, as in MetaIO).
    start : int
        Byte of the file at which the stream begins.

    Raises
    ------
    VolumeError
        If the stream is damaged, ends too early, or, of gzip, is followed by something else.
    """
    values = np.empty(layout.shape, dtype=layout.dtype)
    buffer = memoryview(values.reshape(-1).view(np.uint8).data)
    with reading(layout.file, f"{form}-compressed voxels"), layout.file.open("rb") as file:
        file.seek(start)
        chunks = _gunzipped(file) if form == "gzip" else _inflated(file)
        ahead, done = layout.offset, 0
        for chunk in chunks:
            skipped = min(ahead, len(chunk))
            ahead -= skipped
            piece = memoryview(chunk)[skipped : skipped + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        if done < len(buffer):
            raise EOFError(f"{done} bytes of voxels, expected {len(buffer)}")
    return values


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while chunk := stream.read(_STEP):
            yield chunk


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    """Yield the unpacked pieces of a zlib stream; what follows the stream is left."""
    stream = zlib.decompressobj(wbits=47)  # a header of zlib or of gzip
    waiting = b""
    while not stream.eof:
        waiting = waiting or file.read(_STEP)
        if not waiting:
            raise EOFError("the compressed stream ends too early")
        yield stream.decompress(waiting, _STEP)
        waiting = stream.unconsumed_tail


def gunzip_or_read(
    path: Path, layout: RawLayout
) -> tuple[Callable[[Box], NDArray[Any]], int, tuple[str, ...]]:
    """Return how the voxels of a layout are read, packed by gzip or not, the memory that it holds, and notes.

    Parameters
    ----------
    path : Path
        Path of the header, for errors and notes.

    Raises
    ------
    VolumeError
        If the file cannot hold so many voxels.
    """
    if not is_gzip(layout.file):
        layout.check_length(path)
        return layout.read, 0, layout.trailing(path)
    return (*unpacked(path, layout), ())


def unpacked(
    path: Path, layout: RawLayout, form: Form = "gzip", start: int = 0
) -> tuple[Callable[[Box], NDArray[Any]], int]:
    """Return how boxes of packed voxels are read, which unpacks them once, and the memory that it holds.

    Parameters
    ----------
    path : Path
        Path of the header, for errors.
    layout, form, start
        Layout of the unpacked voxels, compression, and first byte of the stream, as `unpack` takes them.

    Raises
    ------
    VolumeError
        If the file cannot hold so many voxels.
    """
    layout.check_possible(path)
    require_possible(layout.file, layout.offset + layout.num_bytes)

    @lru_cache(maxsize=1)
    def values() -> NDArray[Any]:
        return unpack(layout, form, start)

    return (lambda box: cut(values(), layout.axes, box)), layout.num_bytes
