"""TIFF stacks, OME-TIFF and folders of TIFF slices, decoded strip by strip or tile by tile."""

from __future__ import annotations

import logging
import os
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import MM_PER_UNIT, Box, Triple, Vector, unit_name
from comir_hpc.readers.numbering import NumberedFiles
from comir_hpc.readers.source import NO_THICKNESS, THICKNESS, RawLayout, Source, reading, shape_of, storable

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
_TIFF_ERROR = tifffile.TiffFileError
# OME lengths that are not a unit of a Grid, in mm; the default of PhysicalSizeXUnit is the micrometre.
_MM_PER_OME_UNIT = {
    "pm": 1e-9, "Å": 1e-7, "nm": 1e-6, "µm": 1e-3, "mm": 1.0, "cm": 10.0, "dm": 100.0, "m": 1e3,
    "in": 25.4, "ft": 304.8,
}  # fmt: skip
# What ImageJ writes as its unit, in OME's letters.
_IMAGEJ_UNITS = {
    "micron": "µm", "microns": "µm", "micrometer": "µm", "um": "µm", "µm": "µm", "μm": "µm", "\\u00b5m": "µm",
    "nm": "nm", "nanometer": "nm", "mm": "mm", "millimeter": "mm", "cm": "cm", "m": "m", "inch": "in",
}  # fmt: skip


# ---------------------------------------------------------------------- one file


def tiff(path: Path, dataset: str | None = None) -> Source:
    """Open the volume in a TIFF file, streamed: OME-TIFF, ImageJ hyperstack or plain pages.

    Parameters
    ----------
    dataset : str, optional
        Number of the series, where the file holds several images.

    Raises
    ------
    VolumeError
        If the file holds several images or time points, or its pages are no stack.
    """
    with reading(path, "TIFF", _TIFF_ERROR), _quiet(), tifffile.TiffFile(path) as file:
        _check_pages(path, file)
        number = _series_number(path, file, dataset)
        series = file.series[number]
        kind = {"ome": "OME-TIFF", "imagej": "ImageJ TIFF"}.get(series.kind, "TIFF")
        page = series.keyframe
        shape, axes = _volume_axes(path, series)
        dtype = storable(series.dtype, path)
        planar = shape_of(shape, axes)[1] == 1
        spacing, unit, says = _calibration(file, number, page, planar)
        contiguous = series.dataoffset
        raw = np.dtype(file.byteorder + series.dtype.char)
        atom = _atom(page)
        if page.imagedepth > 1 and contiguous is None:
            raise VolumeError(
                f"{path}: pages of {page.imagedepth} slices each (SGI) are not supported; save one a page"
            )
        files = {path, *(Path(p.parent.filehandle.path) for p in series.pages if p is not None)}
    reader: Any
    if contiguous is not None:
        layout = RawLayout(path, contiguous, raw, shape, axes)
        layout.check_length(path)
        reader, atom = layout.read, (1, 1, 1)
    else:
        reader = _Pages(path, number, shape, axes, dtype).read
    return Source(
        path=path, kind=kind, shape=shape_of(shape, axes), dtype=dtype, read_box=reader,
        files=sorted(files), spacing_zyx=spacing, unit=unit, atom_zyx=atom, says=says,
        notes=(f"{path.name}: {says}",) if spacing and says else (),
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tifffile's log off the terminal: what it objects to and what matters is said in our error."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _check_pages(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse a file whose chain of pages leads beyond its end: tifffile gives the pages before and only logs it."""
    form, handle = file.tiff, file.filehandle
    start = file.pages[len(file.pages) - 1].offset
    handle.seek(start)
    (tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(start + form.tagnosize + tags * form.tagsize)
    (following,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
    if following >= handle.size:
        raise VolumeError(
            f"{path} is truncated: it is {handle.size} bytes long, and the page after number {len(file.pages)} should "
            f"be at byte {following}; copy or export it again"
        )


def _series_number(path: Path, file: tifffile.TiffFile, dataset: str | None) -> int:
    found = [
        f"{n}: {'x'.join(map(str, s.shape))} {s.axes} {s.name}".strip() for n, s in enumerate(file.series)
    ]
    if dataset is None and len(found) == 1:
        return 0
    if dataset is None or not dataset.isdigit() or int(dataset) >= len(found):
        asked = "" if dataset is None else f"--dataset {dataset} is none of them; "
        raise VolumeError(
            f"{path} holds {len(found)} images ({'; '.join(found[:8])}{'; ...' if len(found) > 8 else ''}); "
            f"{asked}name one with --dataset NUMBER, or export pages of one size"
        )
    return int(dataset)


def _volume_axes(path: Path, series: Any) -> tuple[tuple[int, ...], str]:
    """Shape and axes (letters of ``czyx`` and ``1``) of a series."""
    axes, shape = str(series.axes), tuple(int(n) for n in series.shape)
    if (
        "Z" not in axes
    ):  # pages of a plain multi-page file have an axis without a meaning: they are the slices
        axes = re.sub("[QI]", "Z", axes, count=1)
    letters = []
    for axis, length in zip(axes, shape, strict=True):
        known = {"Z": "z", "Y": "y", "X": "x", "C": "c", "S": "c"}.get(axis, "1" if length == 1 else "?")
        letters.append("1" if known == "c" and length == 1 else known)
    named = "".join(letters)
    if "z" not in named:
        named, shape = "z" + named, (1, *shape)
    if (
        "?" in named
        or sorted(named.replace("1", "").replace("c", "")) != ["x", "y", "z"]
        or named.count("c") > 1
    ):
        raise VolumeError(
            f"{path}: axes {series.axes} of {series.shape} are no single volume; expected Z, Y, X and at most one of "
            "channels or colour samples: extract one time point, or save the slices as Z"
        )
    return shape, named


def _atom(page: Any) -> Triple:
    """Voxels (z, y, x) that are decoded at once."""
    if page.is_tiled:
        return 1, int(page.tilelength), int(page.tilewidth)
    return 1, int(min(page.rowsperstrip or page.imagelength, page.imagelength)), int(page.imagewidth)


# ---------------------------------------------------------------------- pages


@lru_cache(maxsize=4)
def _opened(path: Path, stamp: tuple[int, int]) -> tifffile.TiffFile:
    return tifffile.TiffFile(path)


def _open(path: Path) -> tifffile.TiffFile:
    # The list of pages is what takes long to read: it is kept, for as long as the file is the same.
    stat = path.stat()
    return _opened(path, (stat.st_size, stat.st_mtime_ns))


@dataclass(frozen=True)
class _Pages:
    """A volume whose pages are compressed or scattered over the file."""

    path: Path
    number: int
    shape: tuple[int, ...]
    axes: str
    dtype: np.dtype[Any]

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of `box` as (c, z, y, x)."""
        with reading(self.path, f"box {box} of a TIFF volume", _TIFF_ERROR):
            series = _open(self.path).series[self.number]
            page_axes = len(series.keyframe.shape)
            leading, inner = self.axes[:-page_axes], self.axes[-page_axes:]
            counts = self.shape[: len(leading)]
            channels = shape_of(self.shape, self.axes)[0]
            out = np.zeros((channels, *box.shape), dtype=self.dtype)
            for z in range(box.start[0], box.stop[0]):
                for c in range(channels if "c" in leading else 1):
                    place = {"z": z, "c": c, "1": 0}
                    number = np.ravel_multi_index([place[a] for a in leading], counts) if counts else 0
                    target = out[:, z - box.start[0]] if "c" in inner else out[c : c + 1, z - box.start[0]]
                    page = series.pages[int(number)]
                    if page is None:
                        raise VolumeError(
                            f"{self.path}: the page of slice {z}, channel {c} is missing from the file"
                        )
                    read_page(page, box, target)
        return out


def read_page(page: Any, box: Box, out: NDArray[Any]) -> None:
    """Decode the strips or tiles of one page that touch the y and x range of `box` into `out`, (c, y, x).

    Parameters
    ----------
    page : tifffile.TiffPage or TiffFrame
    """
    keyframe, file = page.keyframe, page.parent.filehandle
    if file.closed:  # a further file of an OME-TIFF that is spread over several
        file.open()
    (_, top, left), (_, bottom, right) = box.start, box.stop
    for index in _segments(keyframe, box):
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
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


def _segments(keyframe: Any, box: Box) -> list[int]:
    """Numbers of the strips or tiles that touch the box."""
    _, height, width = _atom(keyframe)
    down, across = -(-keyframe.imagelength // height), -(-keyframe.imagewidth // width)
    planes = keyframe.samplesperpixel if keyframe.planarconfig == 2 else 1
    return [
        (plane * down + row) * across + column
        for plane in range(planes)
        for row in range(box.start[1] // height, -(-box.stop[1] // height))
        for column in range(box.start[2] // width, -(-box.stop[2] // width))
    ]


# ---------------------------------------------------------------------- a folder of slices


def tiff_folder(path: Path, found: NumberedFiles) -> Source | None:
    """Open a folder of TIFF slices of one size as a volume; None if its files hold several pages each.

    Parameters
    ----------
    found : NumberedFiles
        The slices in their order, and what was left out.

    Raises
    ------
    VolumeError
        If slices differ in size or type, or some hold several pages and others one.
    """
    facts = {file: _facts(file) for file in found.files}
    first, (pages, shape, dtype) = found.files[0], facts[found.files[0]]
    for file, (count, *_) in facts.items():
        if (count > 1) != (pages > 1):
            raise VolumeError(
                f"{path}: {file.name} holds {count} pages, {first.name} {pages}; expected one slice a file, or a "
                "volume in every file: put the others in a folder of their own"
            )
    if pages > 1:
        return None
    slices = _Slices(path, found.files, shape, dtype)
    for file, (_, its_shape, its_dtype) in facts.items():
        slices.require_alike(file, its_shape, its_dtype)
    with reading(first, "TIFF slice", _TIFF_ERROR), _quiet(), tifffile.TiffFile(first) as opened:
        page: Any = opened.pages[0].keyframe
        axes, atom = "z" + page.axes.lower().replace("s", "c"), _atom(page)
        _, _, says = _calibration(opened, 0, page, planar=False)
    name = path.resolve().name
    return Source(
        path=path, kind="TIFF slices", shape=shape_of((len(found.files), *shape), axes), dtype=dtype,
        read_box=slices.read, files=found.files, atom_zyx=atom, says=says,
        notes=tuple(f"{name}: {note}" for note in found.notes("slices")),
    )  # fmt: skip


def _facts(file: Path) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Number of pages of a TIFF file, and shape and type of the first."""
    with reading(file, "TIFF slice", _TIFF_ERROR), _quiet(), tifffile.TiffFile(file) as opened:
        page: Any = opened.pages[0].keyframe
        return len(opened.pages), tuple(page.shape), storable(page.dtype, file)


@dataclass(frozen=True)
class _Slices:
    path: Path
    files: tuple[Path, ...]
    page_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of `box` as (c, z, y, x)."""
        slices = [self._slice(file, box) for file in self.files[box.start[0] : box.stop[0]]]
        return np.stack(slices, axis=1)

    def _slice(self, name: Path, box: Box) -> NDArray[Any]:
        with reading(name, "TIFF slice", _TIFF_ERROR), tifffile.TiffFile(name) as file:
            page: Any = file.pages[0].keyframe
            self.require_alike(name, tuple(page.shape), storable(page.dtype, name))
            out = np.zeros((page.samplesperpixel, *box.shape[1:]), dtype=self.dtype)
            read_page(page, box, out)
        return out

    def require_alike(self, name: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Refuse a slice of another size or type than the first."""
        if (shape, dtype) != (self.page_shape, self.dtype):
            raise VolumeError(
                f"{name} is {shape} {dtype}, the other slices in {self.path} are {self.page_shape} {self.dtype}; "
                "remove it or export the stack again"
            )


# ---------------------------------------------------------------------- spacing


def _calibration(
    file: tifffile.TiffFile, number: int, page: Any, planar: bool
) -> tuple[Vector | None, str | None, str]:
    """Spacing (z, y, x) and unit where the file knows all three, and in words what it says otherwise.

    A single slice (`planar`) has a spacing without a thickness, too.
    """
    if file.is_ome and file.ome_metadata:
        return _ome_calibration(file.ome_metadata, number, planar)
    resolution = _resolution(page)
    if file.is_imagej and file.imagej_metadata:
        metadata = file.imagej_metadata
        name = str(metadata.get("unit", "")).strip()
        unit = _IMAGEJ_UNITS.get(name.lower())
        if unit is None:
            return None, None, f"ImageJ's unit is {name!r}, which is no length" if name else ""
        depth = metadata.get("spacing")
        says = NO_THICKNESS if depth is None and planar else ""
        depth = THICKNESS if says else depth
        if depth is None or resolution is None:
            return (
                None,
                None,
                f"ImageJ's metadata has {'no slice spacing' if depth is None else 'no resolution'}",
            )
        spacing = abs(float(depth)), *resolution
        return *_in_unit(tuple(s * _MM_PER_OME_UNIT[unit] for s in spacing), {unit}), says  # type: ignore[arg-type]
    if resolution is not None and page.tags.valueof(296, 1) in (2, 3):
        mm = 25.4 if page.tags.valueof(296) == 2 else 10.0
        y, x = resolution[0] * mm, resolution[1] * mm
        return None, None, f"its resolution tags say y {y:.4g} mm, x {x:.4g} mm and nothing about z"
    return None, None, ""


def _resolution(page: Any) -> tuple[float, float] | None:
    """Units per pixel along y and x, from the resolution tags."""
    tags = [page.tags.valueof(code) for code in (283, 282)]
    if any(t is None or not t[0] or not t[1] for t in tags):
        return None
    (yn, yd), (xn, xd) = tags
    return yd / yn, xd / xn


def _ome_calibration(xml: str, number: int, planar: bool) -> tuple[Vector | None, str | None, str]:
    images = [e for e in ET.fromstring(xml).iter() if e.tag.endswith("}Image") or e.tag == "Image"]
    pixels = next(e for e in images[number].iter() if e.tag.rsplit("}")[-1] == "Pixels").attrib
    sizes: dict[str, float] = {}
    units: set[str] = set()
    for axis in "ZYX":
        unit = pixels.get(f"PhysicalSize{axis}Unit", "µm").replace("μ", "µ")
        length = pixels.get(f"PhysicalSize{axis}")
        if length is not None and unit in _MM_PER_OME_UNIT and float(length) > 0:
            sizes[axis] = float(length) * _MM_PER_OME_UNIT[unit]
            units.add(unit)
    says = NO_THICKNESS if planar and set(sizes) == {"Y", "X"} else ""
    if says:
        sizes["Z"] = THICKNESS * _MM_PER_OME_UNIT[next(iter(units))]
    if len(sizes) == 3:
        return *_in_unit((sizes["Z"], sizes["Y"], sizes["X"]), units), says
    missing = ", ".join(f"PhysicalSize{a}" for a in "ZYX" if a not in sizes)
    return None, None, f"its OME metadata lacks {missing}"


def _in_unit(spacing_mm: Vector, units: set[str]) -> tuple[Vector, str]:
    """Spacing in the file's unit, or in the nearest that a Grid knows (inches and feet become millimetres)."""
    named = units.pop() if len(units) == 1 else ""
    known = {"pm": "nm", "Å": "nm", "nm": "nm", "µm": "um", "cm": "cm", "m": "m"}
    unit = unit_name(known.get(named, "mm"))
    # 12 digits: 0.5 um must read as 0.5, not as 0.49999999999999994.
    z, y, x = (float(f"{s / MM_PER_UNIT[unit]:.12g}") for s in spacing_mm)
    return (z, y, x), unit
