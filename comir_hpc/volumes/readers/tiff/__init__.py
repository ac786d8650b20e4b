"""TIFF stacks, OME-TIFF and folders of TIFF slices, decoded strip by strip or tile by tile."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers.claims import require_credible_bytes
from comir_hpc.volumes.readers.numbering import NumberedFiles
from comir_hpc.volumes.readers.raw import RawLayout, shape_of
from comir_hpc.volumes.readers.source import Source, reading, storable
from comir_hpc.volumes.readers.tiff.calibration import calibration as _calibration
from comir_hpc.volumes.readers.tiff.calibration import declared_planes
from comir_hpc.volumes.readers.tiff.pages import TIFF_ERROR as _TIFF_ERROR
from comir_hpc.volumes.readers.tiff.pages import Pages, hole_notes, not_stored, open_tiff, read_page
from comir_hpc.volumes.readers.tiff.pages import atom as _atom
from comir_hpc.volumes.readers.tiff.pages import quiet as _quiet

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
MICROSCOPES = (".lsm", ".stk", ".svs")
"""TIFF files under names of their makers; they are no slices of a folder."""

_MOST_TAGS = 4096  # tifffile's own limit


# ---------------------------------------------------------------------- one file


def tiff(path: Path, dataset: str | None = None) -> Source:
    """Open the volume in a TIFF file, streamed: OME-TIFF, ImageJ hyperstack or plain pages.

    OME metadata that are damaged do not lose the pixels: the pages are read as slices, with a note, where nothing in
    the text speaks of channels or time points.

    Parameters
    ----------
    dataset : str, optional
        Number of the series, where the file holds several images.

    Raises
    ------
    VolumeError
        If the file holds several images or time points, or its pages are no stack.
    """
    with reading(path, "TIFF", _TIFF_ERROR), _quiet():
        file, damage = open_tiff(path)
        with file:
            return _opened_tiff(path, file, dataset, damage)


def _opened_tiff(path: Path, file: tifffile.TiffFile, dataset: str | None, damage: str) -> Source:
    _check_pages(path, file)
    number = _series_number(path, file, dataset)
    series = file.series[number]
    notes = _page_notes(path, file, series, damage)
    page = series.keyframe
    shape, axes = _volume_axes(path, series)
    dtype = storable(series.dtype, path)
    found = _calibration(file, number, page, planar=shape_of(shape, axes)[1] == 1, damage=damage)
    files = {path, *(Path(p.parent.filehandle.path) for p in series.pages if p is not None)}
    require_credible_bytes(path, shape, dtype, sum(f.stat().st_size for f in files))
    reader, atom = _reader(path, file, number, shape, axes, bool(damage))
    kind = {"ome": "OME-TIFF", "imagej": "ImageJ TIFF"}.get(series.kind, "TIFF")
    if len(file.series) > 1 and dataset is None:
        notes = (
            *notes,
            f"{path.name}: its {len(file.series) - 1} further images are thumbnails, and left out",
        )
    if not series.dataoffset:
        holes = hole_notes(not_stored(series.pages), page.nodata)
        notes = (*notes, *(f"{path.name}: {note}" for note in holes))
    if found.says and not damage:
        notes = (*notes, f"{path.name}: {found.says}")
    return Source(
        path=path, kind=kind, shape=shape_of(shape, axes), dtype=dtype, read_box=reader, files=sorted(files),
        spacing_zyx=found.spacing, unit=found.unit, atom_zyx=atom, says=found.says, notes=notes,
    )  # fmt: skip


def _reader(
    path: Path, file: tifffile.TiffFile, number: int, shape: tuple[int, ...], axes: str, plain: bool
) -> tuple[Any, Any]:
    """Return the function that reads a box, and the smallest box that it decodes."""
    series = file.series[number]
    page, dtype = series.keyframe, storable(series.dtype, path)
    if series.dataoffset:  # at 0 is nothing: the pages are not stored
        raw = np.dtype(file.byteorder + series.dtype.char)
        layout = RawLayout(path, series.dataoffset, raw, shape, axes)
        layout.check_length(path)
        return layout.read, (1, 1, 1)
    if page.imagedepth > 1:
        raise VolumeError(
            f"{path}: pages of {page.imagedepth} slices each (SGI) are not supported; save one a page"
        )
    return Pages(path, number, shape, axes, dtype, plain).read, _atom(page)


def _page_notes(path: Path, file: tifffile.TiffFile, series: Any, damage: str) -> tuple[str, ...]:
    """Hold the pages against what the metadata say of them.

    Raises
    ------
    VolumeError
        If planes are missing, or damaged metadata speak of channels or time points.
    """
    missing = sum(page is None for page in series.pages)
    if missing:
        raise VolumeError(
            f"{path}: its OME metadata name {len(series.pages)} planes, and {missing} of them are not in the file or "
            "in those beside it; copy or export it again, with all its files"
        )
    if damage:
        _require_plain_stack(path, file, series, damage)
        return (
            f"{path.name}: {damage}; its {len(series.pages)} pages are read as slices in the order of the file",
        )
    used, pages = sum(len(s.pages) for s in file.series), len(file.pages)
    if file.is_ome and used < pages:
        return (f"{path.name}: its OME metadata name {used} of its {pages} pages; the others are left out",)
    # A large stack has only one page, and the voxels of all behind it.
    planes = math.prod(series.shape) // math.prod(series.keyframe.shape)
    return _imagej_notes(path, file.imagej_metadata or {}, planes, pages) if file.is_imagej else ()


def _imagej_notes(path: Path, metadata: dict[str, Any], used: int, pages: int) -> tuple[str, ...]:
    """Hold ImageJ's numbers of channels, slices and frames against the pages."""
    images = int(metadata.get("images", 1))
    counts = {name: int(metadata.get(name, 1)) for name in ("channels", "slices", "frames")}
    if not counts.keys() & metadata.keys():
        counts["slices"] = images
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if n > 1) or "one slice"
    product = math.prod(counts.values())
    if product == images == used and pages in (1, images):
        return ()
    if counts["channels"] > 1 or counts["frames"] > 1:
        raise VolumeError(
            f"{path}: ImageJ's metadata say {told} and {images} images, and it has {pages} pages: their order is not "
            "known; save the stack again in ImageJ"
        )
    return (
        f"{path.name}: ImageJ's metadata say {told} and {images} images, and it has {pages} pages: {used} are read",
    )


def _require_plain_stack(path: Path, file: tifffile.TiffFile, series: Any, damage: str) -> None:
    """Refuse damaged OME metadata whose text speaks of an order that the pages alone do not tell."""
    planes = declared_planes(file.pages.first.description)
    # Colours that lie in one page are in no order of pages.
    single = {"C": series.keyframe.samplesperpixel, "T": 1}
    several = any(n not in (1, single[axis]) for axis, n in planes.items() if axis in single)
    wrong = planes.get("Z") not in (None, len(series.pages))
    if several or wrong or len(file.series) > 1:
        sizes = ", ".join(f"Size{axis} {n}" for axis, n in planes.items()) or "no sizes"
        raise VolumeError(
            f"{path}: {damage}, so the order of its {len(file.pages)} pages is not known (the text says {sizes}); "
            "repair the metadata, or export one channel and time point"
        )


def _check_pages(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse a file whose chain of pages leads beyond its end or to no page: tifffile takes those before, silently."""
    form, handle = file.tiff, file.filehandle
    at, number, seen = file.pages[len(file.pages) - 1].offset, len(file.pages), set[int]()
    while at:
        handle.seek(at)
        tags, following = 0, handle.size
        if (told := handle.read(form.tagnosize)) and len(told) == form.tagnosize:
            (tags,) = struct.unpack(form.tagnoformat, told)
            handle.seek(at + form.tagnosize + tags * form.tagsize)
            if len(told := handle.read(form.offsetsize)) == form.offsetsize:
                (following,) = struct.unpack(form.offsetformat, told)
        if following >= handle.size or not 0 < tags <= _MOST_TAGS or at in seen:
            raise VolumeError(
                f"{path} is truncated or damaged: it is {handle.size} bytes long, and at byte {at} where page {number} "
                "should be there is none, or none that leads on; copy or export it again"
            )
        seen.add(at)
        at, number = following, number + 1


def _series_number(path: Path, file: tifffile.TiffFile, dataset: str | None) -> int:
    found = [
        f"{n}: {'x'.join(map(str, s.shape))} {s.axes} {s.name}".strip() for n, s in enumerate(file.series)
    ]
    # Thumbnails are no images to choose from.
    full = [n for n, s in enumerate(file.series) if not s.keyframe.is_reduced]
    if dataset is None and 1 in (len(found), len(full)):
        return full[0] if len(full) == 1 else 0
    if dataset is None or not dataset.isdigit() or int(dataset) >= len(found):
        asked = "" if dataset is None else f"--dataset {dataset} is none of them; "
        raise VolumeError(
            f"{path} holds {len(found)} images ({'; '.join(found[:8])}{'; ...' if len(found) > 8 else ''}); "
            f"{asked}name one with --dataset NUMBER, or export pages of one size"
        )
    return int(dataset)


def _volume_axes(path: Path, series: Any) -> tuple[tuple[int, ...], str]:
    """Return the shape and axes (letters of ``czyx`` and ``1``) of a series."""
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
            f"channels or colour samples: {_remedy(axes, named)}"
        )
    return shape, named


def _remedy(axes: str, named: str) -> str:
    """Say what the user can do about axes that are no volume."""
    if "T" in axes:
        depth = "" if "Z" in axes else " (if its frames are the slices of one volume, save them as Z)"
        return f"extract one time point{depth}"
    return "extract one channel" if named.count("c") > 1 else "save the slices as Z"


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
    first, (pages, shape, dtype, _) = found.files[0], facts[found.files[0]]
    for file, (count, *_) in facts.items():
        if (count > 1) != (pages > 1):
            raise VolumeError(
                f"{path}: {file.name} holds {count} pages, {first.name} {pages}; expected one slice a file, or a "
                "volume in every file: put the others in a folder of their own"
            )
    if pages > 1:
        return None
    slices = _Slices(path, found.files, shape, dtype)
    for file, (_, its_shape, its_dtype, _) in facts.items():
        slices.require_alike(file, its_shape, its_dtype)
    with reading(first, "TIFF slice", _TIFF_ERROR), _quiet(), tifffile.TiffFile(first) as opened:
        page: Any = opened.pages[0].keyframe
        axes, atom = "z" + page.axes.lower().replace("s", "c"), _atom(page)
        says = _calibration(opened, 0, page, planar=False).says
        holes = hole_notes(sum(count for *_, count in facts.values()), page.nodata)
    name = path.resolve().name
    return Source(
        path=path, kind="TIFF slices", shape=shape_of((len(found.files), *shape), axes), dtype=dtype,
        read_box=slices.read, files=found.files, atom_zyx=atom, says=says,
        notes=tuple(f"{name}: {note}" for note in (*found.notes("slices"), *holes)),
    )  # fmt: skip


def _facts(file: Path) -> tuple[int, tuple[int, ...], np.dtype[Any], int]:
    """Read the number of pages of a TIFF file, and shape, type and missing strips of the first."""
    with reading(file, "TIFF slice", _TIFF_ERROR), _quiet(), tifffile.TiffFile(file) as opened:
        page: Any = opened.pages[0].keyframe
        return len(opened.pages), tuple(page.shape), storable(page.dtype, file), not_stored([page])


@dataclass(frozen=True)
class _Slices:
    path: Path
    files: tuple[Path, ...]
    page_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, box: Box) -> NDArray[Any]:
        """Read the voxels of `box` as (c, z, y, x)."""
        # Each file is opened for its slice alone: thousands of open files would meet the system's limit.
        slices = [self._slice(file, box) for file in self.files[box.start[0] : box.stop[0]]]
        return np.stack(slices, axis=1)

    def _slice(self, name: Path, box: Box) -> NDArray[Any]:
        with reading(name, "TIFF slice", _TIFF_ERROR), tifffile.TiffFile(name) as file:
            page: Any = file.pages[0].keyframe
            self.require_alike(name, tuple(page.shape), storable(page.dtype, name))
            # What no strip fills keeps the value for no data.
            out = np.full((page.samplesperpixel, *box.shape[1:]), page.nodata, dtype=self.dtype)
            read_page(page, box, out)
        return out

    def require_alike(self, name: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Refuse a slice of another size or type than the first."""
        if (shape, dtype) != (self.page_shape, self.dtype):
            raise VolumeError(
                f"{name} is {shape} {dtype}, the other slices in {self.path} are {self.page_shape} {self.dtype}; "
                "remove it or export the stack again"
            )
