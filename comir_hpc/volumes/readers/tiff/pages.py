"""Pages of a TIFF file: opened once, decoded strip by strip or tile by tile."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from comir_hpc.space.grid import Box, Triple
from comir_hpc.volumes.readers.raw import shape_of
from comir_hpc.volumes.readers.source import reading

TIFF_ERROR = tifffile.TiffFileError
# What tifffile raises on OME metadata that lack a size or have a text in its place.
_BAD_OME = (KeyError, ValueError, IndexError, TypeError, AttributeError, ArithmeticError)


def open_tiff(path: Path) -> tuple[tifffile.TiffFile, str]:
    """Open a TIFF file, and say in words what is wrong with its OME metadata (nothing: an empty text).

    Where something is wrong with them, the file is opened as if they were not there.
    """
    file = tifffile.TiffFile(path)
    if not file.is_ome:
        return file, ""
    try:
        kinds = {series.kind for series in file.series}
        damage = "" if kinds == {"ome"} else f"its OME metadata are {_why(file)}"
    except _BAD_OME as error:
        damage = f"its OME metadata are damaged ({type(error).__name__}: {str(error)[:60]})"
    if not damage:
        return file, ""
    file.close()
    return tifffile.TiffFile(path, is_ome=False), damage


def _why(file: tifffile.TiffFile) -> str:
    try:
        ET.fromstring(file.pages.first.description)
    except ET.ParseError as error:
        return f"not well-formed XML ({error})"
    return "at odds with its pages"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep tifffile's log off the terminal: what it objects to and what matters is said in our error."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def atom(page: Any) -> Triple:
    """Return the voxels (z, y, x) that are decoded at once."""
    if page.is_tiled:
        return 1, int(page.tilelength), int(page.tilewidth)
    return 1, int(min(page.rowsperstrip or page.imagelength, page.imagelength)), int(page.imagewidth)


@lru_cache(maxsize=4)
def _opened(path: Path, stamp: tuple[int, int], plain: bool) -> tifffile.TiffFile:
    return tifffile.TiffFile(path, is_ome=False) if plain else tifffile.TiffFile(path)


def _open(path: Path, plain: bool) -> tifffile.TiffFile:
    # The list of pages is what takes long to read: it is kept, for as long as the file is the same.
    stat = path.stat()
    return _opened(path, (stat.st_size, stat.st_mtime_ns), plain)


@dataclass(frozen=True)
class Pages:
    """A volume whose pages are compressed or scattered over the file.

    Parameters
    ----------
    number : int
        Number of the series in the file, from 0.
    shape, axes
        Shape of the series, and one letter for each of its axes as `cut` takes them.
    plain : bool
        Whether OME metadata in the file are to be passed over.
    """

    path: Path
    number: int
    shape: tuple[int, ...]
    axes: str
    dtype: np.dtype[Any]
    plain: bool

    def read(self, box: Box) -> NDArray[Any]:
        """Read the voxels of `box` as (c, z, y, x)."""
        with reading(self.path, f"box {box} of a TIFF volume", TIFF_ERROR), quiet():
            series = _open(self.path, self.plain).series[self.number]
            page_axes = len(series.keyframe.shape)
            leading, inner = self.axes[:-page_axes], self.axes[-page_axes:]
            counts = self.shape[: len(leading)]
            channels = shape_of(self.shape, self.axes)[0]
            out = np.full((channels, *box.shape), series.keyframe.nodata, dtype=self.dtype)
            for z in range(box.start[0], box.stop[0]):
                for c in range(channels if "c" in leading else 1):
                    place = {"z": z, "c": c, "1": 0}
                    number = np.ravel_multi_index([place[a] for a in leading], counts) if counts else 0
                    target = out[:, z - box.start[0]] if "c" in inner else out[c : c + 1, z - box.start[0]]
                    read_page(series.pages[int(number)], box, target)
        return out


def read_page(page: Any, box: Box, out: NDArray[Any]) -> None:
    """Decode the strips or tiles of one page that touch the y and x range of `box` into `out`, (c, y, x).

    One without an offset or a length is not stored: `out` keeps what it holds there.

    Parameters
    ----------
    page : tifffile.TiffPage or TiffFrame
        Page of an open file, whose segments are read by their offsets.
    """
    keyframe, file = page.keyframe, page.parent.filehandle
    if file.closed:  # a further file of an OME-TIFF that is spread over several
        file.open()
    (_, top, left), (_, bottom, right) = box.start, box.stop
    for index in _segments(keyframe, box):
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count or not offset:
            continue
        data = os.pread(file.fileno(), count, offset)  # no file position: threads do not disturb each other
        if len(data) < count:
            raise EOFError(f"the file ends {count - len(data)} bytes inside a strip at {offset}")
        tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
        segment, (sample, _, y, x, _), (_, height, width, _) = keyframe.decode(data, index, **tables)
        y0, y1, x0, x1 = max(y, top), min(y + height, bottom), max(x, left), min(x + width, right)
        if segment is None or y0 >= y1 or x0 >= x1:
            continue
        piece = np.moveaxis(segment[0, y0 - y : y1 - y, x0 - x : x1 - x], -1, 0)
        first = sample if keyframe.planarconfig == 2 else 0
        out[first : first + len(piece), y0 - top : y1 - top, x0 - left : x1 - left] = piece


def not_stored(pages: Iterable[Any]) -> int:
    """Count the strips and tiles of pages that have no offset or no length, and so are not in the file."""
    return sum(
        not offset or not count
        for page in pages
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
    )


def hole_notes(holes: int, nodata: float) -> tuple[str, ...]:
    """Say how strips and tiles that are not stored are read."""
    if not holes:
        return ()
    return (
        f"{holes} of its strips or tiles are not stored (their place or length is 0): they are read as {nodata:g}, the "
        "value for no data",
    )


def _segments(keyframe: Any, box: Box) -> list[int]:
    """Return the numbers of the strips or tiles that touch the box."""
    _, height, width = atom(keyframe)
    down, across = -(-keyframe.imagelength // height), -(-keyframe.imagewidth // width)
    planes = keyframe.samplesperpixel if keyframe.planarconfig == 2 else 1
    return [
        (plane * down + row) * across + column
        for plane in range(planes)
        for row in range(box.start[1] // height, -(-box.stop[1] // height))
        for column in range(box.start[2] // width, -(-box.stop[2] // width))
    ]
