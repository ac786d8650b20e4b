"""NIfTI, NRRD and MetaImage: the geometry as ITK reads it, the voxels straight from the file where they are raw.

Transforms that we export are applied by ITK's tools to the original files, so ITK's reading of a header is the one
that counts (its choice between a NIfTI sform and a qform that disagree, too).
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import MM_PER_UNIT, Box, Matrix, Vector
from comir_hpc.readers.source import (
    NO_THICKNESS,
    THICKNESS,
    RawLayout,
    Source,
    cut,
    known_unit,
    reading,
    shape_of,
    storable,
)

_MM_BY_CONVENTION = "the file names no unit of length: its spacing is taken as millimetres, as ITK does"
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}


# ---------------------------------------------------------------------- NIfTI


def nifti(path: Path) -> Source:
    """Open a NIfTI-1 or -2 file; streamed unless it is compressed.

    A fourth (time) or fifth (vector) axis becomes the channels. Values with a slope and an intercept become floats.
    """
    kind = "NIfTI"
    with reading(path, kind, ImageFileError, HeaderDataError):
        image: Any = nibabel.load(path)
        header, proxy = image.header, image.dataobj
        codes = int(header["sform_code"]), int(header["qform_code"])
        unit = _NIFTI_UNITS[header.get_xyzt_units()[0]]
        layout = _nifti_layout(
            path, tuple(int(n) for n in proxy.shape), np.dtype(proxy.dtype), int(proxy.offset)
        )
        slope, intercept = float(proxy.slope), float(proxy.inter)
    spacing, origin, direction = itk_geometry(path, kind)
    scale = MM_PER_UNIT[unit] if unit else 1.0  # ITK has converted to mm already
    notes = [] if unit else [f"{path.name}: {_MM_BY_CONVENTION}"]
    if len(proxy.shape) == 2:
        spacing = THICKNESS * scale, *spacing[1:]
        notes += [f"{path.name}: {NO_THICKNESS}"]
    notes += _nifti_orientation_notes(path, image, codes)
    read, load_bytes = _raw_or_loaded(path, layout, compressed=path.name.lower().endswith(".gz"))
    dtype, read = _rescaled(storable(layout.dtype, path), read, slope, intercept)
    return Source(
        path=path, kind=kind, shape=shape_of(layout.shape, layout.axes), dtype=dtype, read_box=read, files=(path,),
        spacing_zyx=_divided(spacing, scale), unit=unit or "millimeter", origin_xyz=_divided(origin, scale),
        direction=direction, load_bytes=load_bytes, notes=tuple(notes),
    )  # fmt: skip


_NIFTI_UNITS = {"unknown": None, "meter": "meter", "mm": "millimeter", "micron": "micrometer"}


def _nifti_layout(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> RawLayout:
    shape = (*shape, 1) if len(shape) == 2 else shape
    if dtype.names:  # RGB24 and RGBA32
        layout = RawLayout(path, offset, np.dtype(np.uint8), (*shape[::-1], len(dtype.names)), "zyxc")
    else:
        layout = RawLayout(path, offset, dtype, shape[::-1], "zyx")
    extra = len(shape) - 3
    if extra < 0:
        raise VolumeError(f"{path}: an image of {shape} voxels (x) is no volume; expected two or three axes")
    longer = [n for n in shape[3:] if n > 1]
    if len(longer) > 1 or (longer and dtype.names):
        raise VolumeError(
            f"{path}: shape {shape} (x, y, z, t, ...) has more than one axis besides space; extract one time point"
        )
    # File order is x fastest: the further axes come first in C order, and at most one of them is longer than 1.
    leading = "".join("c" if n > 1 else "1" for n in shape[3:][::-1])
    return replace(layout, axes=leading + layout.axes)


def _nifti_orientation_notes(path: Path, image: Any, codes: tuple[int, int]) -> list[str]:
    sform, qform = codes
    if not sform and not qform:
        return [
            f"{path.name}: neither sform nor qform is set: axes are taken as LPS x, y, z and the origin as 0"
        ]
    if not sform or not qform:
        return []
    size = np.asarray([*(*image.shape, 1)[:3], 1.0])
    size[:3] -= 1
    difference = (image.header.get_sform() - image.header.get_qform()) @ np.diag(size)
    # The largest displacement of a corner is at most the sum over the axes; 1 % of a voxel is rounding.
    largest = float(np.linalg.norm(difference, axis=0).sum())
    if largest <= 0.01 * min(image.header.get_zooms()[:3]) + 1e-3:
        return []
    taken = "sform" if sform == 1 else "qform"
    return [
        f"{path.name}: sform (code {sform}) and qform (code {qform}) disagree by up to {largest:.3g}; "
        f"the {taken} is used, as ITK does"
    ]


def _rescaled(
    dtype: np.dtype[Any], read: Callable[[Box], NDArray[Any]], slope: float, intercept: float
) -> tuple[np.dtype[Any], Callable[[Box], NDArray[Any]]]:
    if slope == 1 and intercept == 0:
        return dtype, read
    # float32 holds every 16-bit integer; wider ones need double.
    wide = dtype.itemsize > (2 if dtype.kind in "iu" else 4)
    floating = np.dtype(np.float64 if wide else np.float32)

    def rescaled(box: Box) -> NDArray[Any]:
        values: NDArray[Any] = read(box).astype(np.float64) * slope + intercept
        return values.astype(floating)

    return floating, rescaled


# ---------------------------------------------------------------------- NRRD


def nrrd(path: Path) -> Source:
    """Open an NRRD file (or the .nhdr header of one); streamed when its encoding is raw."""
    kind = "NRRD"
    with reading(path, kind):
        fields, length = _nrrd_fields(path)
    said = " ".join(fields.get("spacings", "").lower().split())
    spaced = "space directions" in fields or (said != "" and not set(said.split()) <= {"nan", "none"})
    units = {u.strip('"') for u in (fields.get("space units") or fields.get("units") or "").split()}
    units -= {"", "none", "???"}
    layout = _nrrd_layout(path, fields, length)
    return _itk_source(path, kind, layout, spaced=spaced, units=units, files=_nrrd_files(path, fields))


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields, names in lower case, and the length of the header in bytes."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        if not file.readline().startswith(b"NRRD"):
            raise VolumeError(f"{path} does not begin with NRRD; it is another format or damaged")
        for line in iter(file.readline, b""):
            text = line.decode("utf-8", errors="replace").strip()
            if not text:
                break
            name, separator, value = text.partition(":")
            if separator and not value.startswith("=") and not text.startswith("#"):
                fields[name.strip().lower()] = value.strip()
        return fields, file.tell()


def _nrrd_data_file(fields: dict[str, str]) -> str | None:
    return fields.get("data file") or fields.get("datafile")


def _nrrd_files(path: Path, fields: dict[str, str]) -> tuple[Path, ...]:
    name = _nrrd_data_file(fields)
    if name is None:
        return (path,)
    if name.upper().startswith("LIST") or "%" in name:
        return (path, path.parent)
    return path, path.parent / name


def _nrrd_layout(path: Path, fields: dict[str, str], length: int) -> RawLayout | None:
    """Where the voxels lie, or None when only ITK can unpack them."""
    code = next((c for c, names in _NRRD_TYPES.items() if fields.get("type", "").lower() in names), None)
    name, skip = _nrrd_data_file(fields), int(fields.get("byte skip", fields.get("byteskip", "0")))
    simple = fields.get("encoding", "").lower() == "raw" and int(fields.get("line skip", "0")) == 0
    if code is None or not simple or (name and (name.upper().startswith("LIST") or "%" in name)):
        return None
    shape = tuple(int(n) for n in fields["sizes"].split())[::-1]
    kinds = fields.get("kinds", "domain " * len(shape)).lower().split()[::-1]
    spatial = [k in ("domain", "space") for k in kinds]
    if len(shape) in (2, 3) and all(spatial):
        axes = "zyx"[-len(shape) :]
    elif len(shape) == 4 and spatial == [True, True, True, False]:
        axes = "zyxc"
    else:
        return None
    order = {"big": ">", "little": "<"}.get(fields.get("endian", "").lower(), "=")
    file = path.parent / name if name else path
    layout = RawLayout(file, 0 if name else length, np.dtype(order + code), shape, axes)
    if skip < 0:  # -1: the voxels are the end of the file
        return replace(layout, offset=(file.stat().st_size if file.is_file() else 0) - layout.num_bytes)
    return replace(layout, offset=layout.offset + skip)


# ---------------------------------------------------------------------- MetaImage


def metaimage(path: Path) -> Source:
    """Open a MetaImage (.mha, or .mhd with its data file); streamed unless it is compressed."""
    kind = "MetaImage"
    with reading(path, kind):
        fields, length = _meta_fields(path)
    spaced = "elementspacing" in fields or "elementsize" in fields
    units = {fields.get("distanceunits", "")} - {"", "?", "UNKNOWN"}
    layout = _meta_layout(path, fields, length)
    name = fields.get("elementdatafile", "LOCAL")
    files: tuple[Path, ...] = (path,)
    if name.upper() != "LOCAL":
        many = "%" in name or name.upper().startswith("LIST")
        files = (path, path.parent if many else path.parent / name)
    return _itk_source(path, kind, layout, spaced=spaced, units=units, files=files)


def _meta_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields, names in lower case, and the length of the header in bytes."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        # ElementDataFile is the last line of every header; a header is far below 1 MiB.
        for line in iter(lambda: file.readline(1 << 16), b""):
            name, separator, value = line.decode("utf-8", errors="replace").partition("=")
            if not separator or file.tell() > 1 << 20:
                break
            fields[name.strip().lower()] = value.strip()
            if name.strip().lower() == "elementdatafile":
                return fields, file.tell()
    raise VolumeError(f"{path} has no ElementDataFile line; it is no MetaImage or its header is damaged")


def _meta_layout(path: Path, fields: dict[str, str], length: int) -> RawLayout | None:
    code, name = _META_TYPES.get(fields.get("elementtype", "")), fields["elementdatafile"]
    packed = (
        fields.get("compresseddata", "False").lower() == "true" or fields.get("binarydata", "True") != "True"
    )
    shape = tuple(int(n) for n in fields["dimsize"].split())[::-1]
    if code is None or packed or len(shape) not in (2, 3) or "%" in name or name.upper().startswith("LIST"):
        return None
    channels = int(fields.get("elementnumberofchannels", "1"))
    big = fields.get("binarydatabyteordermsb", fields.get("elementbyteordermsb", "False")).lower() == "true"
    local = name.upper() == "LOCAL"
    file, skip = path if local else path.parent / name, int(fields.get("headersize", "0"))
    axes = "zyx"[-len(shape) :]
    layout = RawLayout(file, length if local else max(skip, 0), np.dtype((">" if big else "<") + code),
                       (*shape, channels) if channels > 1 else shape, axes + "c" if channels > 1 else axes)  # fmt: skip
    if not local and skip < 0:  # -1: the voxels are the end of the file
        return replace(layout, offset=(file.stat().st_size if file.is_file() else 0) - layout.num_bytes)
    return layout


# ---------------------------------------------------------------------- what they share


def itk_header(path: Path, kind: str) -> sitk.ImageFileReader:
    """A SimpleITK reader that has read the header of an image of any number of axes.

    Raises
    ------
    VolumeError
        If ITK cannot read it.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what ITK objects to is said in our error or note
    try:
        with reading(path, kind):
            reader.ReadImageInformation()
    except VolumeError as error:
        if "orthonormal" in str(error):
            raise VolumeError(
                f"{path}: its axes are sheared, not perpendicular; resample it on a grid with perpendicular axes first"
            ) from error
        raise
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
    return reader


def itk_geometry(path: Path, kind: str) -> tuple[Vector, Vector, Matrix]:
    """Spacing (z, y, x), origin (x, y, z) and direction of the first three axes, as ITK reads them."""
    return geometry_of(itk_header(path, kind), path)


def geometry_of(header: sitk.ImageFileReader | sitk.Image, path: Path) -> tuple[Vector, Vector, Matrix]:
    """Spacing (z, y, x), origin (x, y, z) and direction from anything of SimpleITK that has them.

    An image of two axes lies in the plane z = 0.
    """
    dimension = header.GetDimension()
    if dimension < 2:
        raise VolumeError(
            f"{path}: an image of {dimension} axes, {header.GetSize()} voxels (x); expected two or three"
        )
    direction = np.eye(3)
    axes = min(dimension, 3)
    direction[:axes, :axes] = np.asarray(header.GetDirection()).reshape(dimension, dimension)[:axes, :axes]
    # Single-precision headers leave 1e-7 of shear; the nearest rotation is what was meant. Real shear stays, and
    # Grid refuses it.
    left, _, right = np.linalg.svd(direction)
    if np.allclose(left @ right, direction, atol=1e-3):
        direction = left @ right
    x, y, z = (*header.GetSpacing(), THICKNESS)[:3]
    rows = [tuple(float(v) for v in row) for row in direction]
    origin = tuple(float(o) + 0.0 for o in (*header.GetOrigin(), 0.0)[:3])
    return (z, y, x), origin, tuple(rows)  # type: ignore[return-value]


def _itk_source(
    path: Path,
    kind: str,
    layout: RawLayout | None,
    *,
    spaced: bool,
    units: set[str],
    files: tuple[Path, ...],
) -> Source:
    header = itk_header(path, kind)
    if header.GetDimension() not in (2, 3):
        raise VolumeError(
            f"{path}: {header.GetDimension()} axes of {header.GetSize()} voxels (x, y, ...); expected three: "
            "extract one volume of the sequence"
        )
    spacing, origin, direction = geometry_of(header, path)
    dtype = storable(itk_dtype(header), path)
    x, y, z = (int(n) for n in (*header.GetSize(), 1)[:3])
    shape = (int(header.GetNumberOfComponents()), z, y, x)
    if layout is not None and shape_of(layout.shape, layout.axes) != shape:
        layout = None
    read, load_bytes = _raw_or_loaded(path, layout, shape=shape, dtype=dtype)
    unit = known_unit(units or {"mm"})
    notes = () if units or not spaced else (f"{path.name}: {_MM_BY_CONVENTION}",)
    if header.GetDimension() == 2:
        notes = (*notes, f"{path.name}: {NO_THICKNESS}")
    return Source(
        path=path, kind=kind, shape=shape, dtype=dtype, read_box=read, files=files,
        spacing_zyx=spacing if spaced else None, unit=unit if spaced else None,
        says="" if unit else f"its units are {', '.join(sorted(units))}",
        origin_xyz=origin, direction=direction, load_bytes=load_bytes, notes=notes,
    )  # fmt: skip


def itk_dtype(header: sitk.ImageFileReader) -> np.dtype[Any]:
    """Type of one component of the voxels."""
    name = sitk.GetPixelIDValueAsString(header.GetPixelID())
    words = name.removeprefix("vector of ").split()
    if words[0] == "complex":
        return np.dtype(np.complex64)
    if words[-1] == "float":
        return np.dtype(np.float64 if words[0] == "64-bit" else np.float32)
    sign = "u" if "unsigned" in words else "i"
    return np.dtype(f"{sign}{int(words[0].removesuffix('-bit')) // 8}")


def _raw_or_loaded(
    path: Path,
    layout: RawLayout | None,
    *,
    compressed: bool = False,
    shape: tuple[int, int, int, int] | None = None,
    dtype: np.dtype[Any] | None = None,
) -> tuple[Callable[[Box], NDArray[Any]], int]:
    """How voxels are read, and the memory that it holds: 0 for raw ones, the whole volume for packed ones."""
    if layout is not None and not compressed:
        layout.check_length(path)
        return layout.read, 0

    @lru_cache(maxsize=1)
    def unpacked() -> NDArray[Any]:
        assert layout is not None
        return _gunzip(path, layout)

    @lru_cache(maxsize=1)
    def image() -> sitk.Image:
        return sitk.ReadImage(str(path))

    def read(box: Box) -> NDArray[Any]:
        if layout is not None:
            return cut(unpacked(), layout.axes, box)
        values = sitk.GetArrayViewFromImage(image())  # valid as long as the image, which the cache holds
        axes = "zyx"[-image().GetDimension() :]
        return cut(values, axes if values.ndim == len(axes) else axes + "c", box)

    if layout is not None:
        return read, layout.num_bytes
    assert shape is not None
    assert dtype is not None
    return read, math.prod(shape) * dtype.itemsize + path.stat().st_size


def _gunzip(path: Path, layout: RawLayout) -> NDArray[Any]:
    """Unpack straight into the array: one copy of the volume in memory, no more."""
    values = np.empty(layout.shape, dtype=layout.dtype)
    buffer = memoryview(values.reshape(-1).view(np.uint8).data)
    with reading(path, "gzip-compressed NIfTI"), gzip.open(path) as file:
        file.read(layout.offset)
        done = 0
        while done < len(buffer):
            step = file.readinto(buffer[done : done + (1 << 24)])
            if not step:
                raise EOFError(f"{done} bytes of voxels, expected {len(buffer)}")
            done += step
    return values


def _divided(vector: Vector, scale: float) -> Vector:
    a, b, c = (v / scale for v in vector)
    return a, b, c
