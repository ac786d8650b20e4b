"""NIfTI-1 and NIfTI-2, one file or a pair (.hdr and .img), compressed or not, in either byte order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers.nifti_forms import nifti_place
from comir_hpc.volumes.readers.packed import gunzip_or_read, opened
from comir_hpc.volumes.readers.raw import RawLayout, shape_of
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS, Source, reading, storable

_LONGEST_HEADER = 544  # NIfTI-2 with its extension flag
_SINGLE_DATA = {348: 352, 540: 544}  # where the voxels of a single file begin at the earliest
_MAGIC = {b"n+1\0": 348, b"ni1\0": 348, b"n+2\0": 540, b"ni2\0": 540}


def nifti(path: Path) -> Source:
    """Open a NIfTI-1 or -2 file; streamed unless it is compressed.

    A fourth (time) or fifth (vector) axis becomes the channels. Values with a slope and an intercept become floats.

    Raises
    ------
    VolumeError
        If its header is damaged, claims more voxels than the file holds, or does not say where they lie.
    """
    block = header_block(path)
    if magic_of(block)[:2] == b"ni":
        raise VolumeError(f"{path} is the header of a pair; name it .hdr, with its voxels in .img beside it")
    return nifti_from(path, block, path, (path,))


def header_block(path: Path) -> bytes:
    """Read the first bytes of a header file, unpacked.

    Raises
    ------
    VolumeError
        If it cannot be read or is too short for any header.
    """
    with reading(path, "NIfTI"), opened(path) as file:
        block = file.read(_LONGEST_HEADER)
        if len(block) < 348:
            raise EOFError(f"{len(block)} bytes, expected a header of 348 or 540")
    return block


def magic_of(block: bytes) -> bytes:
    """Return the four letters that tell which NIfTI this is; empty where it is none."""
    # NIfTI-1 has its mark at the end of the header, NIfTI-2 right behind the header's size.
    for place in (block[344:348], block[4:8]):
        if place in _MAGIC:
            return place
    return b""


def nifti_from(path: Path, block: bytes, data: Path, files: tuple[Path, ...]) -> Source:
    """Open NIfTI voxels in `data` by the header `block`.

    Parameters
    ----------
    path : Path
        Path that the user named, for errors.
    files : tuple of Path
        The header file, and the data file where it is another one.

    Raises
    ------
    VolumeError
        For the same reasons as `nifti`.
    """
    kind, magic = "NIfTI", magic_of(block)
    with reading(path, kind, HeaderDataError), np.errstate(all="ignore"):
        header = _header(block, magic)
        offset, notes = _offset(header, magic, path.name)
        if not 1 <= int(header["dim"][0]) <= 7:
            raise HeaderDataError(f"{int(header['dim'][0])} axes, expected 1 to 7")
        shape = tuple(int(n) for n in header.get_data_shape())
        layout = layout_of(path, data, shape, np.dtype(header.get_data_dtype()), offset)
        dtype = storable(layout.dtype, path)
        slope, intercept, unscaled = _scaling(header, layout, path.name)
    czyx = shape_of(layout.shape, layout.axes)
    place = nifti_place(header, czyx[1:], path, len(shape))
    spacing, notes = place.spacing_zyx, (*place.notes, *notes, *unscaled)
    if len(shape) == 2:
        spacing = None if spacing is None else (THICKNESS, *spacing[1:])
        notes += (f"{path.name}: {NO_THICKNESS}",)
    if czyx[0] > 1 and len(layout.shape) > 3 and not layout.axes.endswith("c"):
        notes += (
            f"{path.name}: its {czyx[0]} volumes (x, y, z, t, ...: {shape}) become the channels of one; if they are "
            "time points of something that moves, extract one of them",
        )
    read, load_bytes, trailing = gunzip_or_read(path, layout)
    dtype, read = rescaled(dtype, read, slope, intercept)
    return Source(
        path=path, kind=kind, shape=czyx, dtype=dtype, read_box=read, files=files,
        spacing_zyx=spacing, unit=place.unit, unit_assumed=place.unit_assumed,
        says="" if spacing else f"its pixdim is {np.asarray(header['pixdim'])[1:4].tolist()} (x, y, z)",
        origin_xyz=place.origin_xyz, direction=place.direction,
        load_bytes=load_bytes, notes=(*notes, *trailing),
    )  # fmt: skip


def _header(block: bytes, magic: bytes) -> Any:
    if magic not in _MAGIC:
        raise HeaderDataError(f"magic {block[344:348]!r}, expected n+1 or n+2")
    size = _MAGIC[magic]
    # The size of the header is the only number whose value is known before the byte order is.
    for order, endianness in (("little", "<"), ("big", ">")):
        if int.from_bytes(block[:4], order) == size:  # type: ignore[arg-type]
            kind: Any = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
            # Unchecked: nibabel would mend numbers, and a reader that says what it found needs them as they stand.
            return kind(block[:size].ljust(size, b"\0"), endianness=endianness, check=False)
    raise HeaderDataError(f"header size {int.from_bytes(block[:4], 'little')}, expected {size}")


def _offset(header: Any, magic: bytes, name: str) -> tuple[int, tuple[str, ...]]:
    """Return the byte at which the voxels begin, and a note where the header does not say it."""
    said = float(header["vox_offset"])
    # A pair has no smallest offset.
    first = 0 if magic.startswith(b"ni") else _SINGLE_DATA[_MAGIC[magic]]
    if said == 0 and first:
        return first, (
            f"{name}: vox_offset is 0: its voxels are taken to begin behind the header, at byte {first}",
        )
    if said != int(said) or said < first:
        raise HeaderDataError(f"vox_offset {said:g}, expected a whole number of {first} or more")
    return int(header["vox_offset"]), ()


def layout_of(path: Path, data: Path, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> RawLayout:
    """Return the layout of voxels in NIfTI's order: x fastest, then y, z, and the axes that become channels.

    Parameters
    ----------
    path, data : Path
        The header, for errors, and the file that holds the voxels.
    shape : tuple of int
        Voxels along x, y, z and the further axes: two axes or more, the fastest first.

    Raises
    ------
    VolumeError
        If this is no volume, or more than one further axis is longer than 1.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise VolumeError(
            f"{path}: an image of {shape} voxels (x, y, ...) is no volume; expected two or three axes"
        )
    shape = (*shape, 1) if len(shape) == 2 else shape
    if dtype.names:  # RGB24 and RGBA32
        layout = RawLayout(data, offset, np.dtype(np.uint8), (*shape[::-1], len(dtype.names)), "zyxc")
    else:
        layout = RawLayout(data, offset, dtype, shape[::-1], "zyx")
    longer = [n for n in shape[3:] if n > 1]
    if len(longer) > 1 or (longer and dtype.names):
        raise VolumeError(
            f"{path}: shape {shape} (x, y, z, t, ...) has more than one axis besides space; extract one time point"
        )
    # File order is x fastest: the further axes come first in C order, and at most one of them is longer than 1.
    leading = "".join("c" if n > 1 else "1" for n in shape[3:][::-1])
    return replace(layout, axes=leading + layout.axes)


def _scaling(header: Any, layout: RawLayout, name: str) -> tuple[float, float, tuple[str, ...]]:
    """Read slope and intercept of the values, 1 and 0 where there are none, and note what is not applied."""
    slope, intercept = header.get_slope_inter()
    raw = float(header["scl_slope"]), float(header["scl_inter"])
    if slope is None:
        ignored = np.isfinite(raw[1]) and raw[1] != 0
        note = f"{name}: scl_slope {raw[0]:g} means that values are not scaled: scl_inter {raw[1]:g} is not applied"
        return 1.0, 0.0, (note,) if ignored else ()
    if layout.axes.endswith("xc") and raw != (1.0, 0.0):
        return (
            1.0,
            0.0,
            (
                f"{name}: NIfTI scales no colours: scl_slope {raw[0]:g} and scl_inter {raw[1]:g} are not applied",
            ),
        )
    return float(slope), float(intercept), ()


def rescaled(
    dtype: np.dtype[Any], read: Callable[[Box], NDArray[Any]], slope: float, intercept: float
) -> tuple[np.dtype[Any], Callable[[Box], NDArray[Any]]]:
    """Return type and reader of values times `slope` plus `intercept`: floats, where these change anything."""
    if slope == 1 and intercept == 0:
        return dtype, read
    # float32 holds every 16-bit integer; wider ones need double.
    wide = dtype.itemsize > (2 if dtype.kind in "iu" else 4)
    floating = np.dtype(np.float64 if wide else np.float32)

    def rescaled(box: Box) -> NDArray[Any]:
        # In double precision first: an intercept of -1024 after a slope of 1e-4 would lose digits otherwise.
        values: NDArray[Any] = read(box).astype(np.float64) * slope + intercept
        return values.astype(floating)

    return floating, rescaled
