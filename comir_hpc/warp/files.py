"""The warped volume as one image file of a format that other programs read.

A file is made in memory and written whole or not at all. What does not fit into memory is written as .zarr, block by
block.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.files import written_whole
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.conventions.grids import ras_from_index as nifti_matrix
from comir_hpc.transforms.itk import itk_image
from comir_hpc.warp.tiff import IMAGEJ_TYPES, OME_TYPES, write_imagej, write_ome

_LONGEST_NIFTI = 32767  # voxels along an axis: its header counts in 16 bits
_LARGEST_TIFF = (1 << 32) - (1 << 20)  # bytes: its offsets have 32 bits, and ImageJ reads no BigTIFF
_LARGEST_HEADER = 1 << 12  # bytes: more than the header of any format that is written
_NIFTI_OFFSET = 352  # bytes from the beginning of a file to its voxels
_GZIP_LEVEL = 3  # on a scale of 1 to 9: 6, the usual one, takes twice as long for a few per cent
_VISIBLE_SHIFT = 0.01  # voxels by which a grid may move before the user is told


@dataclass(frozen=True)
class FileFormat:
    """How volumes are kept in one kind of file.

    Attributes
    ----------
    name : str
        Name of the format, for messages.
    write : callable
        ``write(path, values, grid)``; values are (c, z, y, x). Returns notes for the user.
    copies, copies_of_channels : int
        Number of times that all values are in memory while they are written, the values themselves included: of one
        channel, and of several.
    dtypes : tuple of str
        Types that the format keeps; any where it is empty.
    """

    name: str
    write: Callable[[Path, NDArray[Any], Grid], tuple[str, ...]]
    copies: int
    copies_of_channels: int
    dtypes: tuple[str, ...] = ()


def file_format(path: Path) -> FileFormat | None:
    """Return the format that a name stands for, or None for .zarr.

    Raises
    ------
    ConfigError
        If the name ends in none of the known suffixes.
    """
    name = path.name.lower()
    if name.endswith(".zarr"):
        return None
    found = next((FORMATS[suffix] for suffix in FORMATS if name.endswith(suffix)), None)
    if found is None:
        raise ConfigError(
            f"{path}: unknown format; expected .zarr (any size) or one of {', '.join(FORMATS)} (made in memory)"
        )
    return found


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that a file keeps for values of a volume: float32 for float16, which the formats lack."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def require_fitting(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse a volume that a file format cannot hold.

    Parameters
    ----------
    shape : four int
        Voxels of the result along c, z, y, x.

    Raises
    ------
    VolumeError
        If the format cannot hold it; the message has what does not fit and what does.
    """
    kept, dtype = file_format(path), stored_dtype(dtype)
    assert kept is not None
    if kept.dtypes and dtype.name not in kept.dtypes:
        raise VolumeError(
            f"{path}: {kept.name} holds {', '.join(kept.dtypes)}, and the moving volume is {dtype}; write "
            f"{'.ome.tif, ' if dtype.name in OME_TYPES else ''}.nii.gz, .nrrd, .mha or .zarr, which hold it"
        )
    if kept.write is _write_nifti and max(shape) > _LONGEST_NIFTI:
        raise VolumeError(
            f"{path}: NIfTI ends at {_LONGEST_NIFTI} voxels along an axis, and the result has {max(shape)}; write "
            ".nrrd, .mha or .zarr"
        )
    size = math.prod(shape) * dtype.itemsize
    if kept.write is write_imagej and size > _LARGEST_TIFF:
        raise VolumeError(
            f"{path}: a TIFF that ImageJ reads ends at 4 GiB, and the result has {in_words(size)}; write "
            ".ome.tif, .nrrd, .mha or .zarr"
        )


def predicted_bytes(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Predict the bytes of memory that holding and writing the values (c, z, y, x) takes."""
    kept, kept_dtype = file_format(path), stored_dtype(dtype)
    assert kept is not None
    copies = kept.copies if shape[0] == 1 else kept.copies_of_channels
    voxels = math.prod(shape)
    return copies * voxels * kept_dtype.itemsize + (voxels * dtype.itemsize if kept_dtype != dtype else 0)


def stored_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the bytes of a file of values (c, z, y, x) at most, its header included."""
    return math.prod(shape) * stored_dtype(dtype).itemsize + _LARGEST_HEADER


def require_memory(path: Path, num_bytes: int) -> None:
    """Refuse what does not fit into memory, before it is begun.

    Raises
    ------
    VolumeError
        If less is free than is needed; the message has both.
    """
    free = available_bytes()
    if num_bytes > free:
        raise VolumeError(
            f"{path} needs {in_words(num_bytes)} of memory, since a single file is made in memory; "
            f"{in_words(free)} are free. Write NAME.zarr, which needs a block at a time"
        )


def require_free_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is taken or whose folder cannot be written, before anything is computed.

    Raises
    ------
    VolumeError
        If something is there and `overwrite` is not set, it is a folder, or its own folder cannot be made.
    """
    try:
        if path.is_dir():
            raise VolumeError(f"{path} is a folder; choose another name")
        if path.exists() and not overwrite:
            raise VolumeError(f"{path} exists; choose another name, or pass --overwrite")
        make_folder(path)
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VolumeError(f"{path} cannot be written ({error.strerror}); make room or get access") from error


def make_folder(path: Path) -> None:
    """Make the folder in which a file is to lie.

    Raises
    ------
    OSError
        If the file system refuses; also where a file has the folder's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is no folder") from error


def write_file(path: Path, values: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Write a volume as one file, whole or not at all.

    Parameters
    ----------
    path : Path
        Path of the file, whose suffix says the format (`FORMATS`). A file of that name is replaced.
    values : (c, z, y, x)
        Voxels of the result, in their stored unit.
    grid : Grid
        Grid of the result: where its voxels lie.

    Returns
    -------
    Notes for the user: what the format cannot keep.

    Raises
    ------
    VolumeError
        If the format cannot hold the values, or the file cannot be written.
    """
    kept = file_format(path)
    assert kept is not None
    require_fitting(path, values.shape, values.dtype)
    notes: tuple[str, ...] = ()
    if values.dtype == np.float16:
        values = values.astype(np.float32)
        notes = (f"{path.name}: {kept.name} has no float16; the values are kept as float32, exactly",)
    try:
        with written_whole(path) as spare:
            # ITK chooses the format by the suffix, and knows it in small letters only.
            small = spare.with_suffix(spare.suffix.lower())
            try:
                notes += kept.write(small, values, grid)
                small.replace(spare)
            finally:
                if small != spare:
                    small.unlink(missing_ok=True)
    except OSError as error:
        # Not every library says why it stopped.
        full = shutil.disk_usage(path.parent).free < values.nbytes
        reason = os.strerror(errno.ENOSPC) if full else error.strerror or str(error)
        raise VolumeError(f"{path} cannot be written ({reason}); make room or get access") from error
    return tuple(note.replace(small.name, path.name) for note in notes)


def _write_nifti(path: Path, values: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Write NIfTI-1 in mm, with one matrix as sform and qform; channels lie along the fourth axis."""
    matrix = nifti_matrix(grid)
    kind: Any = nibabel.Nifti1Header  # its methods carry no types
    header = kind()
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape[:0:-1] + ((len(values),) if len(values) > 1 else ()))
    header.set_xyzt_units("mm")
    header.set_sform(matrix, code=1)
    header.set_qform(matrix, code=1)
    header.set_data_offset(_NIFTI_OFFSET)
    with path.open("wb") as raw, _maybe_packed(raw, path.suffix == ".gz") as file:
        header.write_to(file)
        file.write(bytes(_NIFTI_OFFSET - file.tell()))
        # Our order, x fastest and channels slowest, is NIfTI's. A plane at a time, so that nothing is copied.
        for plane in values.reshape(-1, *values.shape[2:]):
            file.write(np.ascontiguousarray(plane).data)
    notes = []
    if len(values) > 1:
        notes.append(f"{path.name}: its {len(values)} channels lie along the fourth axis")
    ends = np.array([[0, 0, 0, 1], [*(n - 1 for n in grid.shape_zyx[::-1]), 1]])
    shift = float(np.abs(ends @ (header.get_sform() - matrix).T).max()) / grid.finest_mm
    if shift > _VISIBLE_SHIFT:
        notes.append(
            f"{path.name}: NIfTI keeps its grid in single precision, which moves voxels by up to {shift:.2g} voxels"
        )
    return tuple(notes)


@contextmanager
def _maybe_packed(raw: BinaryIO, packed: bool) -> Iterator[Any]:
    """Give a file that compresses what is written to it, or the file itself."""
    if not packed:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_GZIP_LEVEL, mtime=0) as file:
        yield file


def _write_itk(path: Path, values: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Write NRRD or MetaImage in mm and LPS, not compressed, so that a box can be read alone."""
    try:
        sitk.WriteImage(itk_image(values[0] if len(values) == 1 else values, grid), str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
    # ITK says nothing of a disk that is full.
    if path.stat().st_size < values.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return ()


_NIFTI = FileFormat("NIfTI", _write_nifti, copies=1, copies_of_channels=1)
_ITK = FileFormat("this format", _write_itk, copies=2, copies_of_channels=3)
_TIFF = FileFormat("a TIFF of ImageJ", write_imagej, copies=1, copies_of_channels=2, dtypes=IMAGEJ_TYPES)
_OME = FileFormat("OME-TIFF", write_ome, copies=1, copies_of_channels=1, dtypes=OME_TYPES)
FORMATS = {
    ".nii": _NIFTI, ".nii.gz": _NIFTI, ".nrrd": _ITK, ".mha": _ITK,
    ".ome.tif": _OME, ".ome.tiff": _OME,  # before .tif, in which they end, too
    ".tif": _TIFF, ".tiff": _TIFF,
}  # fmt: skip
"""Format of each suffix."""
