"""What formats share whose headers ITK reads: geometry, value types, and voxels that only ITK can unpack.

Transforms that we export are applied by ITK's tools to the original files, so ITK's reading of a header is the one
that counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import MM_PER_UNIT, Box
from comir_hpc.volumes.readers.packed import Form, require_possible, unpacked
from comir_hpc.volumes.readers.placement import Placement, placement
from comir_hpc.volumes.readers.raw import RawLayout, cut, shape_of
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS, Source, known_unit, reading, storable

_MM_BY_CONVENTION = (
    "the file names no unit of length: its numbers are taken as millimetres, as ITK does, "
    "unless --unit says another"
)
_IMAGE_IO = {"MetaImage": "MetaImageIO", "NRRD": "NrrdImageIO"}


@dataclass(frozen=True)
class Header:
    """What our own reading of a header's text adds to ITK's.

    Attributes
    ----------
    layout : RawLayout, optional
        Place of the voxels in the file, or in what it unpacks to; None when only ITK can unpack them.
    form : str, optional
        Packing of the voxels, ``gzip`` or ``zlib``; None where they are raw.
    start : int
        Byte of the file at which what is packed begins.
    spaced : bool
        Whether the file itself gives a voxel spacing.
    units : sequence of str
        Unit of length of each world axis, as written; empty where there is none.
    gain : int
        Bytes that one byte of the data can stand for at most.
    data : sequence of Path
        Files that hold the voxels; empty where they are not single files.
    files : sequence of Path
        Every file that the content depends on.
    notes : tuple of str
        Assumptions that were made, as sentences for the user.
    renamed : tuple of str
        Notes where the data file has another name than the header says, which ITK does not find.
    """

    layout: RawLayout | None
    spaced: bool
    units: Sequence[str]
    gain: int
    data: Sequence[Path]
    files: Sequence[Path]
    notes: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    form: Form | None = None
    start: int = 0


def itk_header(path: Path, kind: str) -> sitk.ImageFileReader:
    """Return a SimpleITK reader that has read the header of an image of any number of axes.

    Parameters
    ----------
    kind : str
        The format in words; where ITK would know it by a suffix in small letters only, its reader is named.

    Raises
    ------
    VolumeError
        If ITK cannot read the header.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if kind in _IMAGE_IO:
        reader.SetImageIO(_IMAGE_IO[kind])
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what ITK objects to is said in our error or note
    try:
        with reading(path, kind):
            reader.ReadImageInformation()
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
    return reader


def place_of(
    header: sitk.ImageFileReader | sitk.Image, path: Path, mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Placement:
    """Return the placement of anything of SimpleITK that has spacing, origin and direction.

    Sheared axes give a note.

    A negative spacing turns the direction of its axis round, as in an image that ITK has read whole. A spacing that is
    0 or no number stays as it is, for `Grid` to ask for it.

    Parameters
    ----------
    mm : three float
        Factors that turn the file's lengths along the world's axes x, y, z into mm.

    Raises
    ------
    VolumeError
        If the axes are not perpendicular (see `placement`), or there are fewer than two.
    """
    dimension = header.GetDimension()
    if dimension < 2:
        raise VolumeError(
            f"{path}: an image of {dimension} axes, {header.GetSize()} voxels (x); expected two or three"
        )
    axes, direction = min(dimension, 3), np.eye(3)
    direction[:axes, :axes] = np.asarray(header.GetDirection()).reshape(dimension, dimension)[:axes, :axes]
    spacing = np.asarray((*header.GetSpacing(), THICKNESS)[:3], dtype=np.float64)
    # With 1 in its place the axes can be examined all the same; the user is asked for the spacing later.
    missing = ~np.isfinite(spacing) | (spacing == 0)
    origin = [o * f for o, f in zip((*header.GetOrigin(), 0.0)[:3], mm, strict=True)]
    size = (*header.GetSize(), 1)[:3]
    columns = np.diag(mm) @ direction * np.where(missing, 1, spacing)
    found = placement(columns, origin, size[::-1], path)
    lengths = np.where(missing, spacing, found.spacing_zyx[::-1])
    # Directions written in decimals are 1e-7 off; the spacing is meant as it stands.
    turned = "".join(a for a, s in zip("xyz", spacing, strict=True) if s < 0)
    notes = (
        (
            f"{path.name}: its spacing is negative along {', '.join(turned)}: the axis is turned round, as ITK does",
        )
        if turned
        else ()
    )
    # Lengths that differ from the file's spacing by rounding alone get its digits back: 0.5, not 0.49999999.
    as_written = np.abs(spacing) * mm[0]
    lengths = np.where(np.isclose(lengths, as_written, rtol=1e-6, atol=0), as_written, lengths)
    x, y, z = (float(v) for v in lengths)
    return Placement((z, y, x), found.origin_xyz, found.direction, (*notes, *found.notes))


def itk_source(path: Path, kind: str, own: Header) -> Source:
    """Make a source from ITK's reading of a header, with our own reading where voxels are raw.

    Raises
    ------
    VolumeError
        If ITK cannot read the header, it describes no volume, or the file is shorter than it says.
    """
    header = itk_header(path, kind)
    if header.GetDimension() not in (2, 3):
        raise VolumeError(
            f"{path}: {header.GetDimension()} axes of {header.GetSize()} voxels (x, y, ...); expected three: "
            "extract one volume of the sequence"
        )
    unit, factors, notes = _unit(path, own)
    place = place_of(header, path, factors)
    dtype = storable(itk_dtype(header), path)
    x, y, z = (int(n) for n in (*header.GetSize(), 1)[:3])
    shape = (int(header.GetNumberOfComponents()), z, y, x)
    read, load_bytes, trailing = _raw_or_loaded(path, kind, own, shape, dtype)
    notes = (*own.notes, *notes, *place.notes, *trailing)
    if header.GetDimension() == 2:
        notes = (*notes, f"{path.name}: {NO_THICKNESS}")
    return Source(
        path=path, kind=kind, shape=shape, dtype=dtype, read_box=read, files=own.files,
        spacing_zyx=place.spacing_zyx if own.spaced else None, unit=unit if own.spaced else None,
        unit_assumed=not own.units,
        says="" if unit else f"its units are {', '.join(sorted(set(own.units)))}",
        origin_xyz=place.origin_xyz, direction=place.direction, load_bytes=load_bytes, notes=notes,
    )  # fmt: skip


def _unit(path: Path, own: Header) -> tuple[str | None, tuple[float, float, float], tuple[str, ...]]:
    """Return the unit of all axes (None where it is no known one), factors into it, and notes."""
    same = (1.0, 1.0, 1.0)
    if not own.units:
        return "millimeter", same, (f"{path.name}: {_MM_BY_CONVENTION}",) if own.spaced else ()
    if len(set(own.units)) == 1:
        unit = known_unit(own.units)
        note = f"{path.name}: its numbers are in {unit}; ITK's tools take them as millimetres"
        return unit, same, (note,) if unit and unit != "millimeter" else ()
    names = [known_unit({u}) for u in own.units]
    if None in names:
        raise VolumeError(
            f"{path}: the units of its axes are {', '.join(own.units)} (x, y, z), of which not all are known lengths; "
            "write one unit for all of them into the header"
        )
    factors = [MM_PER_UNIT[n] for n in (*names, names[-1])[:3] if n]
    return "millimeter", (factors[0], factors[1], factors[2]), (
        f"{path.name}: its axes are in {', '.join(own.units)} (x, y, z); all is given in millimetres",
    )  # fmt: skip


def itk_dtype(header: sitk.ImageFileReader) -> np.dtype[Any]:
    """Return the type of one component of the voxels."""
    name = sitk.GetPixelIDValueAsString(header.GetPixelID())
    words = name.removeprefix("vector of ").split()
    if words[0] == "complex":
        return np.dtype(np.complex64)
    if words[-1] == "float":
        return np.dtype(np.float64 if words[0] == "64-bit" else np.float32)
    sign = "u" if "unsigned" in words else "i"
    return np.dtype(f"{sign}{int(words[0].removesuffix('-bit')) // 8}")


def _raw_or_loaded(
    path: Path, kind: str, own: Header, shape: tuple[int, int, int, int], dtype: np.dtype[Any]
) -> tuple[Callable[[Box], NDArray[Any]], int, tuple[str, ...]]:
    """Return how voxels are read, how many bytes of memory that holds (0 for raw ones), and notes."""
    layout, num_bytes = own.layout, math.prod(shape) * dtype.itemsize
    if (
        layout is not None
        and shape_of(layout.shape, layout.axes) == shape
        and layout.dtype.newbyteorder("=") == dtype
    ):
        if own.form:
            return (*unpacked(path, layout, own.form, own.start), own.renamed)
        layout.check_length(path)
        return layout.read, 0, (*own.renamed, *layout.trailing(path))
    if own.form == "zlib":
        raise VolumeError(
            f"{path}: ITK reads {shape} voxels (c, z, y, x) of {dtype} from its header, but its text says others; "
            "the header is damaged: export it again"
        )
    if own.renamed:
        raise VolumeError(
            f"{own.renamed[0]}, but its voxels are packed, which only ITK reads: rename it as the header says"
        )
    for file in own.data[:1]:
        require_possible(file, num_bytes, own.gain)

    # Read once and kept: what ITK unpacks is unpacked as a whole, whatever box is asked for.
    @lru_cache(maxsize=1)
    def image() -> sitk.Image:
        return itk_header(path, kind).Execute()

    def read(box: Box) -> NDArray[Any]:
        values = sitk.GetArrayViewFromImage(image())  # valid as long as the image, which the cache holds
        axes = "zyx"[-image().GetDimension() :]
        return cut(values, axes if values.ndim == len(axes) else axes + "c", box)

    return read, num_bytes + sum(file.stat().st_size for file in own.data), ()
